"""The outer step against one written out here, and which validation counts as the best."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES
from metarun.components.algo.maml import MamlConfig
from metarun.components.backbone.mlp import MlpConfig
from metarun.components.data.sinusoid import SinusoidConfig
from metarun.components.inner_opt.sgd import SgdConfig
from metarun.components.outer_opt.base import OuterOptConfig
from metarun.config.catalogue import schemas
from metarun.config.component import as_keywords
from metarun.config.compose import composed, register_schemas
from metarun.config.run import TrainConfig, TrainerConfig
from metarun.errors import ConfigError
from metarun.system.ranks import Ranks
from metarun.training.loop import meta_step, remember
from metarun.training.meta_gradient import over_ranks
from metarun.training.metrics import Metrics
from metarun.training.setup import Setup, build
from metarun.training.state import fresh

STEPS = 6
Meta = dict[str, Tensor]


def setup_of(outer: OuterOptConfig, **changes: Any) -> Setup:
    """A tiny run with a learned inner learning rate, which the outer optimizer must not decay."""
    config = TrainConfig(
        seed=3,
        algo=MamlConfig(),
        data=SinusoidConfig(),
        backbone=MlpConfig(hidden=[4, 3]),
        inner_opt=SgdConfig(lr=0.05, learn=["lr"]),
        outer_opt=outer,
        trainer=TrainerConfig(steps=STEPS, meta_batch=2, **changes),
    )
    config.engine.precision, config.engine.compile = "float64", "none"
    return build(config, torch.device("cpu"))


def clipped(grads: Meta, value: float | None, norm: float | None) -> Meta:
    """First each element to ± value, then all together to a norm: of what the first left."""
    if value is not None:
        grads = {name: grad.clamp(-value, value) for name, grad in grads.items()}
    if norm is not None:
        length = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        grads = {name: grad * min(1.0, norm / (length + 1e-6)) for name, grad in grads.items()}
    return grads


class Outer:
    """The outer optimizers of the command line, by their formulas and one element at a time."""

    def __init__(self, config: OuterOptConfig) -> None:
        self.config, self.step = config, 0
        self.first: Meta = {}
        self.second: Meta = {}

    def lr(self, name: str = "") -> float:
        """At the step to come: constant, or half a cosine from lr down to min_lr at the end."""
        c = self.config
        own = [g["lr_factor"] for g in c.groups if name.startswith(g["params"].rstrip("*"))]
        lr = c.lr * (own or [1])[0] if name else c.lr
        if c.schedule == "constant":
            return lr
        return c.min_lr + (lr - c.min_lr) * (1 + math.cos(math.pi * self.step / STEPS)) / 2

    def update(self, meta: Meta, grads: Meta) -> Meta:
        grads = clipped(grads, self.config.clip_value, self.config.clip_norm)
        lrs = {name: self.lr(name) for name in meta}
        self.step += 1
        return {name: self.moved(name, meta[name], grads[name], lrs[name]) for name in meta}

    def moved(self, name: str, p: Tensor, g: Tensor, lr: float) -> Tensor:
        c: Any = self.config
        decay = 0.0 if name.startswith("inner_opt.") else c.weight_decay
        if c.name == "adamw":
            p = p - lr * decay * p
        else:
            g = g + decay * p
        if c.name == "sgd":
            if c.momentum:
                buffer = c.momentum * self.first[name] + g if name in self.first else g
                self.first[name] = buffer
                g = g + c.momentum * buffer if c.nesterov else buffer
            return p - lr * g
        zero = torch.zeros_like(p)
        first = c.beta1 * self.first.get(name, zero) + (1 - c.beta1) * g
        second = c.beta2 * self.second.get(name, zero) + (1 - c.beta2) * g**2
        self.first[name], self.second[name] = first, second
        unbiased = first / (1 - c.beta1**self.step), second / (1 - c.beta2**self.step)
        return p - lr * unbiased[0] / (unbiased[1].sqrt() + c.eps)


HEAD_10 = [{"params": "head.bias", "lr_factor": 10}, {"params": "head.*", "lr_factor": 2}]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("adam", {}),
    ("adam", {"beta1": 0.5, "beta2": 0.7, "eps": 0.1, "lr": 0.01}),
    ("adam", {"weight_decay": 0.3, "schedule": "cosine"}),
    ("adam", {"schedule": "cosine", "lr": 0.01, "min_lr": 0.004}),
    ("adamw", {"weight_decay": 0.3, "lr": 0.1, "schedule": "cosine", "min_lr": 0.05}),
    ("adamw", {"beta1": 0.5, "beta2": 0.7, "eps": 0.1}),
    ("adam", {"groups": HEAD_10, "weight_decay": 0.3, "schedule": "cosine", "min_lr": 5e-4}),
    ("sgd", {"groups": [{"params": "inner_opt.*", "lr_factor": 0.5}, *HEAD_10], "clip_norm": 0.1}),
    ("sgd", {"groups": [{"params": "*", "lr_factor": 3}], "momentum": 0.8, "lr": 3e-4}),
    ("sgd", {"momentum": 0.9, "lr": 0.001}),
    ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "lr": 0.001}),
    ("sgd", {"clip_value": 0.05}),
    ("sgd", {"clip_norm": 0.05}),
    ("sgd", {"clip_norm": 1e9}),
    ("sgd", {"clip_value": 0.02, "clip_norm": 0.05}),
    ("sgd", {"clip_value": 0.02, "clip_norm": 0.05, "schedule": "cosine", "weight_decay": 0.1}),
]


def transposed(setup: Setup) -> Setup:
    """The same gradients, in memory column by column, as those of convolutions may be."""

    def gradient(meta: Any, tasks: Any, step: int = 0) -> tuple[Meta, Metrics]:
        grads, metrics = setup.gradient(meta, tasks, step)
        return {n: g.T.contiguous().T if g.dim() == 2 else g for n, g in grads.items()}, metrics

    return replace(setup, gradient=gradient)


def as_it_is(setup: Setup) -> Setup:
    return setup


@pytest.mark.parametrize(
    ("name", "options", "layout"),
    [(*case, as_it_is) for case in CASES]
    + [(*case, transposed) for case in CASES if "clip_norm" in case[1] or case[0] == "adamw"],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_outer_step_is_the_one_written_out(
    name: str, options: dict[str, Any], layout: Callable[[Setup], Setup]
) -> None:
    outer = schemas("outer_opt")[name](**options)
    setup = layout(setup_of(outer))
    state, oracle = fresh(setup), Outer(outer)
    expected = {key: value.detach().clone() for key, value in state.meta.items()}
    assert "inner_opt.lr" in expected
    for step in range(STEPS):
        assert state.optimizer.param_groups[0]["lr"] == pytest.approx(oracle.lr(), rel=1e-12)
        grads, _ = setup.gradient(expected, setup.source.sample("train", 2 * step, 2))
        expected = oracle.update(expected, {n: g.clone() for n, g in grads.items()})
        meta_step(setup, state)
        for key, value in expected.items():
            torch.testing.assert_close(state.meta[key].detach(), value, rtol=1e-9, atol=1e-12)


def test_every_setting_of_an_outer_optimizer_is_among_the_cases() -> None:
    for name, schema in schemas("outer_opt").items():
        given = {key for n, options in CASES if n == name for key in options}
        given |= {f.name for f in fields(OuterOptConfig)}  # which all share
        assert set(as_keywords(schema())) <= given, name


def test_sparse_maml_learns_its_masks_faster() -> None:
    """7.5e-3 beside 1e-3, in the authors' code."""
    register_schemas()
    small = ["data=sinusoid", "backbone=mlp", "algo=sparse_maml", "algo.inner_steps=1"]
    config = composed("train", small)
    state = fresh(build(config, torch.device("cpu")))
    of_lr = {group["lr"]: [*group["params"]] for group in state.optimizer.param_groups}
    masks = [v for n, v in state.meta.items() if n.startswith("inner_opt.precondition.mask/")]
    assert of_lr.keys() == {0.001, 0.0075} and len(masks) == 6
    assert [id(v) for v in of_lr[0.0075]] == [id(v) for v in masks]
    assert all(group["weight_decay"] == 0 for group in state.optimizer.param_groups)
    with pytest.raises(ConfigError, match=r"no parameter matches 'inner_opt\.precondition"):
        build(replace(config, algo=MamlConfig()), torch.device("cpu"))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"params": "heads.*", "lr_factor": 2}], "no parameter matches 'heads"),
        ([{"params": "*", "lr_factor": 2}, *HEAD_10], "all that 'head.bias' matches is in an earl"),
        ([{"params": "head.*", "lr": 2}], "is no group; expected e.g."),
        ([{"params": 3, "lr_factor": 2}], "is no group; expected e.g."),
        ([{"params": "head.*", "lr_factor": "2"}], "must be a number"),
        ([{"params": "head.*", "lr_factor": True}], "must be a number"),
        ([{"params": "head.*", "lr_factor": 0}], "must be above 0"),
        ([{"params": "head.*", "lr_factor": float("inf")}], "must be a finite number"),
        ([{"params": "head.*", "lr_factor": 1e-6}], r"min_lr=0\.0001: must be from 0 to the lear"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(schemas("outer_opt")["adam"](groups=groups, min_lr=1e-4, schedule="cosine"))


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_with_shares_of_different_size_take_the_step_of_one(count: int) -> None:
    """Five tasks: the mean over ranks is weighted by how many each has."""
    setup = setup_of(schemas("outer_opt")["sgd"]())
    meta = {name: value.detach() for name, value in fresh(setup).meta.items()}
    expected, expected_metrics = setup.gradient(meta, setup.source.sample("train", 0, 5))

    class Sums(Ranks):
        def total(self, values: Tensor) -> Tensor:
            sent.append(values)
            return torch.stack(sent).sum(0)

    sent: list[Tensor] = []
    for rank in range(count):
        ranks = Sums(rank, count)
        start, own = ranks.share(5)
        grads, metrics = setup.gradient(meta, setup.source.sample("train", start, own))
        grads, metrics = over_ranks(ranks, own / 5, grads, metrics)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-12, atol=1e-14)
    for part in ("loss", "score", "inner_losses"):  # the norm is taken of the mean
        ours, theirs = getattr(metrics, part), getattr(expected_metrics, part)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "scores", "best"),
    [
        ("regression", [0.5, 0.5, 0.7], 1),
        ("regression", [0.5, 0.4, 0.4, float("nan")], 2),
        ("classification", [0.5, 0.5, 0.4], 1),
        ("classification", [float("nan"), 0.5, 0.6, 0.6], 3),
    ],
)
@pytest.mark.parametrize("keep", [1, 3])
def test_of_equal_validations_the_earlier_is_the_best(
    kind: str, scores: list[float], best: int, keep: int
) -> None:
    setup = setup_of(schemas("outer_opt")["sgd"](), keep_best=keep)
    setup = replace(setup, objective=OBJECTIVES[kind])
    state = fresh(setup)
    for state.step, score in enumerate(scores, start=1):
        improved = remember(setup, state, {"score": score, "ci95": 0.1})
        assert improved == (state.best is not None and state.best["step"] == state.step)
    assert state.best is not None and state.best["step"] == best
    sign = -1 if kind == "classification" else 1
    order = sorted((sign * s, i) for i, s in enumerate(scores, start=1) if math.isfinite(s))
    assert [kept["step"] for kept in state.top] == [step for _, step in order][:keep]
