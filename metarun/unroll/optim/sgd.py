"""Stochastic gradient descent with momentum, as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    Settings,
    decayed_gradient,
    is_off,
    per_parameter,
    signed,
    step_count,
)


class SGDState(NamedTuple):
    """Of one parameter: momentum buffer (its shape) and number of steps taken."""

    momentum: Tensor
    step: Tensor


def sgd(
    lr: float | Tensor = 0.001,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> InnerOptimizer:
    """SGD with the update rule of `torch.optim.SGD`.

    A momentum, dampening or weight decay that is the constant 0 costs nothing; a tensor that
    is 0 stays in the graph and can be learned.

    Raises:
        ValueError: nesterov without momentum or with dampening, as in torch.
    """
    if nesterov and (is_off(momentum) or not is_off(dampening)):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")

    def init(p: Tensor) -> SGDState:
        return SGDState(torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: SGDState, p: Tensor, h: Settings) -> tuple[Tensor, SGDState]:
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        buffer, mu, damp = state.momentum, h["momentum"], h["dampening"]
        if not is_off(mu):
            # The first gradient enters undamped: torch's buffer starts as a copy of it.
            fresh = g if is_off(damp) else torch.where(state.step == 0, g, (1 - damp) * g)
            buffer = mu * buffer + fresh
            g = g + mu * buffer if nesterov else buffer
        return p - h["lr"] * g, SGDState(buffer, state.step + 1)

    hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
