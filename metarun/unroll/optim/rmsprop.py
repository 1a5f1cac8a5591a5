"""RMSprop (Tieleman and Hinton 2012), plain or centred, as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    Settings,
    decayed_gradient,
    is_off,
    per_parameter,
    safe_sqrt,
    signed,
)


class RMSpropState(NamedTuple):
    """Of one parameter: averages of squared gradients and momentum buffer (its shape).

    `first` holds the average gradient if centred, and is empty otherwise.
    """

    second: Tensor
    momentum: Tensor
    first: tuple[Tensor, ...]


def rmsprop(
    lr: float | Tensor = 0.01,
    alpha: float | Tensor = 0.99,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    momentum: float | Tensor = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> InnerOptimizer:
    """RMSprop with the update rule of `torch.optim.RMSprop`.

    A centred variance that rounding makes negative counts as zero; torch's root is NaN there.
    """

    def init(p: Tensor) -> RMSpropState:
        first = (torch.zeros_like(p),) if centered else ()
        return RMSpropState(torch.zeros_like(p), torch.zeros_like(p), first)

    def rule(g: Tensor, state: RMSpropState, p: Tensor, h: Settings) -> tuple[Tensor, RMSpropState]:
        alpha_, mu = h["alpha"], h["momentum"]
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        second = alpha_ * state.second + (1 - alpha_) * g * g
        first = tuple(alpha_ * old + (1 - alpha_) * g for old in state.first)
        variance = second - first[0] * first[0] if centered else second
        move = g / (safe_sqrt(variance) + h["eps"])
        buffer = state.momentum
        if not is_off(mu):
            move = buffer = mu * buffer + move
        return p - h["lr"] * move, RMSpropState(second, buffer, first)

    hyper = {
        "lr": lr,
        "alpha": alpha,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
    }
    return per_parameter(init, rule, hyper)
