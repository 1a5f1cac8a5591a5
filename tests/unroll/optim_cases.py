"""Shared by the tests of inner optimizers: a loss, a start, options for each of torch's."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from metarun.unroll import InnerOptimizer, Params, State

_ADAM = [
    {},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.99), "eps": 1e-3},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
]
CASES: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.7, "dampening": 0.3},
        {"weight_decay": 0.05},
        {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.02, "maximize": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
    ],
    Adam: [
        *_ADAM,
        {"amsgrad": True, "betas": (0.5, 0.6)},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ],
    AdamW: [*_ADAM, {"amsgrad": True, "betas": (0.5, 0.6)}],
    NAdam: [
        *_ADAM,
        {"momentum_decay": 0.5},
        {"momentum_decay": 0.0, "decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    RAdam: [
        *_ADAM,  # the variance is rectified from the sixth step on
        {"betas": (0.9, 0.6)},  # never
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    ],
    Adamax: _ADAM,
    Adadelta: [
        {},
        {"rho": 0.5, "eps": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
    ],
    Adagrad: [
        {},
        {"lr_decay": 0.1, "eps": 1e-3},
        {"initial_accumulator_value": 0.3},
        {"maximize": True, "weight_decay": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 2.0},
    ],
    RMSprop: [
        {},
        {"alpha": 0.5, "eps": 1e-3},
        {"momentum": 0.8},
        {"centered": True},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "maximize": True},
    ],
    Rprop: [
        {},
        {"etas": (0.3, 1.5)},
        {"step_sizes": (0.02, 0.05)},
        {"maximize": True, "step_sizes": (0.001, 0.1)},
    ],
    ASGD: [
        {},
        {"lambd": 0.1, "alpha": 0.5},
        {"t0": 4.0, "weight_decay": 0.1},
        {"t0": 2.5, "lambd": 0.1, "maximize": True},
    ],
    Adafactor: [
        {},
        {"beta2_decay": -0.5, "weight_decay": 0.1},
        {"eps": (0.3, 0.1)},
        {"eps": (None, 2.0), "d": 1.5},
        {"d": 3.0, "maximize": True},
    ],
    Muon: [
        {},
        {"momentum": 0.5, "nesterov": False, "weight_decay": 0.0},
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3},
        {"eps": 10.0, "adjust_lr_fn": "original"},
        {"adjust_lr_fn": "match_rms_adamw"},
    ],
}
"""Options of torch's classes; together those of a class set each of its options."""
with suppress(ValueError):  # older releases of torch do not have it
    Muon([nn.Parameter(torch.ones(1, 1))], adjust_lr_fn="spectral_unclamped")
    CASES[Muon].append({"adjust_lr_fn": "spectral_unclamped"})

EVERY_CASE = [(kind, options) for kind, several in CASES.items() for options in several]
IDS = [f"{kind.__name__}-{options}" for kind, options in EVERY_CASE]


def start(kind: type[Optimizer] | None = None) -> Params:
    """A matrix, a vector, a tensor of three dimensions and a number, in float64.

    Muon gets matrices only: tall, wide and square.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (4, 3), "b": (3,), "k": (2, 3, 2), "s": ()}
    if kind is Muon:
        shapes = {"w": (4, 3), "b": (1, 3), "k": (2, 6), "s": (1, 1)}
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in shapes.items()
    }


def loss_of(params: Mapping[str, Tensor]) -> Tensor:
    """Neither quadratic nor separable, so that wrong moments cannot hide; bounded both ways.

    Small enough that twenty steps do not amplify rounding.
    """
    w, b, k, s = (params[name] for name in ("w", "b", "k", "s"))
    mixed = (w.sin() * b.tanh()).sum() + (w - b).tanh().pow(2).mean() + (w * b.sum()).cos().sum()
    mixed = mixed + (k * s).sin().sum() + (k.sum() * w.sin().mean()).cos()
    return 0.2 * (mixed + (s - 1).tanh().sum())


def run(
    optimizer: InnerOptimizer, params: Params, steps: int, state: State | None = None
) -> tuple[Params, State]:
    """Steps of an inner optimizer on `loss_of`."""
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        grads = torch.func.grad(loss_of)(params)
        params, state = optimizer.update(grads, state, params, optimizer.hyper)
    return params, state


def step_torch(optimizer: Optimizer, params: Mapping[str, Tensor], steps: int) -> None:
    """Steps of a torch optimizer on `loss_of`, in place."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Equal to 1e-12."""
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)
