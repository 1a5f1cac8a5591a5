"""Adagrad (Duchi, Hazan and Singer 2011), as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    decayed_gradient,
    per_parameter,
    safe_sqrt,
    signed,
    step_count,
)


class AdagradState(NamedTuple):
    """What Adagrad remembers of one parameter.

    Attributes:
        sum: the sum of squared gradients, of the parameter's shape.
        step: () float64, the number of steps taken.
    """

    sum: Tensor
    step: Tensor


def adagrad(
    lr: float | Tensor = 0.01,
    lr_decay: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    initial_accumulator_value: float | Tensor = 0.0,
    eps: float | Tensor = 1e-10,
    maximize: bool = False,
) -> InnerOptimizer:
    """Adagrad with the update rule of `torch.optim.Adagrad`.

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included:

        sₜ = sₜ₋₁ + gₜ²,  where s₀ = initial_accumulator_value
        θₜ = θₜ₋₁ − lr / (1 + (t − 1) · lr_decay) · gₜ / (√sₜ + eps)

    Args:
        lr, lr_decay, weight_decay, eps: numbers, or tensors that broadcast against each
            parameter. Weight decay is an L2 penalty.
        initial_accumulator_value: likewise; read at a parameter's first step, when its sum starts.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; all arguments but `maximize` are its hyperparameters, and its state
        is an `AdagradState` by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import adagrad, unroll
        >>> start = {"w": torch.tensor([1.0, 100.0])}
        >>> end = unroll(lambda p, step: p["w"].square().sum(), start, adagrad(lr=0.1), steps=1)
        >>> end.params["w"] - start["w"]  # lr each, whatever the gradient
        tensor([-0.1000, -0.1000])

    References:
        Duchi, Hazan and Singer 2011, Adaptive subgradient methods for online learning and
        stochastic optimization.
    """

    def init(p: Tensor) -> AdagradState:
        return AdagradState(torch.zeros_like(p), step_count(p))

    def rule(
        g: Tensor, state: AdagradState, p: Tensor, h: ParamHyper
    ) -> tuple[Tensor, AdagradState]:
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        # Read here, not in `init`, so that it is a hyperparameter like the others.
        start = torch.where(state.step == 0, h["initial_accumulator_value"], state.sum)
        total = start.to(p.dtype) + g * g
        slowing = (1 + state.step * h["lr_decay"]).to(p.dtype)
        move = g / (safe_sqrt(total) + h["eps"])
        return p - h["lr"] / slowing * move, AdagradState(total, state.step + 1)

    hyper = {
        "lr": lr,
        "lr_decay": lr_decay,
        "weight_decay": weight_decay,
        "initial_accumulator_value": initial_accumulator_value,
        "eps": eps,
    }
    return per_parameter(init, rule, hyper)
