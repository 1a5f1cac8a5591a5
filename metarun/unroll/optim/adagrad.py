"""Adagrad (Duchi, Hazan and Singer 2011), as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    Settings,
    decayed_gradient,
    per_parameter,
    safe_sqrt,
    signed,
    step_count,
)


class AdagradState(NamedTuple):
    """Of one parameter: sum of squared gradients (its shape) and number of steps taken."""

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

    `initial_accumulator_value` is read at a parameter's first step, when its sum starts.
    """

    def init(p: Tensor) -> AdagradState:
        return AdagradState(torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: AdagradState, p: Tensor, h: Settings) -> tuple[Tensor, AdagradState]:
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
