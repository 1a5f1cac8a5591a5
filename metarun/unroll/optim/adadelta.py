"""Adadelta (Zeiler 2012), as a differentiable inner optimizer."""

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
)


class AdadeltaState(NamedTuple):
    """Of one parameter: running averages of squared gradients and squared moves (its shape)."""

    second: Tensor
    moves: Tensor


def adadelta(
    lr: float | Tensor = 1.0,
    rho: float | Tensor = 0.9,
    eps: float | Tensor = 1e-6,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> InnerOptimizer:
    """Adadelta with the update rule of `torch.optim.Adadelta`: eps is inside both roots."""

    def init(p: Tensor) -> AdadeltaState:
        return AdadeltaState(torch.zeros_like(p), torch.zeros_like(p))

    def rule(
        g: Tensor, state: AdadeltaState, p: Tensor, h: Settings
    ) -> tuple[Tensor, AdadeltaState]:
        rho_, eps_ = h["rho"], h["eps"]
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        second = rho_ * state.second + (1 - rho_) * g * g
        move = safe_sqrt(state.moves + eps_) / safe_sqrt(second + eps_) * g
        moves = rho_ * state.moves + (1 - rho_) * move * move
        return p - h["lr"] * move, AdadeltaState(second, moves)

    hyper = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
