"""Adadelta (Zeiler 2012), as a differentiable inner optimizer."""

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
)


class AdadeltaState(NamedTuple):
    """What Adadelta remembers of one parameter.

    Attributes:
        second: running average of squared gradients, of the parameter's shape.
        moves: running average of squared moves, of the parameter's shape.
    """

    second: Tensor
    moves: Tensor


def adadelta(
    lr: float | Tensor = 1.0,
    rho: float | Tensor = 0.9,
    eps: float | Tensor = 1e-6,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> InnerOptimizer:
    """Adadelta with the update rule of `torch.optim.Adadelta`: eps is inside both roots.

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included:

        vₜ = rho · vₜ₋₁ + (1 − rho) · gₜ²
        Δₜ = √(sₜ₋₁ + eps) / √(vₜ + eps) · gₜ
        sₜ = rho · sₜ₋₁ + (1 − rho) · Δₜ²
        θₜ = θₜ₋₁ − lr · Δₜ

    Args:
        lr, rho, eps, weight_decay: numbers, or tensors that broadcast against each parameter.
            Weight decay is an L2 penalty.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; the first four arguments are its hyperparameters, and its state is
        an `AdadeltaState` (v, s) by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import adadelta, unroll
        >>> start = {"w": torch.tensor([1.0, 100.0])}
        >>> end = unroll(lambda p, step: p["w"].square().sum(), start, adadelta(), steps=1)
        >>> end.params["w"] - start["w"]  # the scale of the gradient hardly matters
        tensor([-0.0032, -0.0032])

    References:
        Zeiler 2012, ADADELTA: an adaptive learning rate method (arXiv 1212.5701).
    """

    def init(p: Tensor) -> AdadeltaState:
        return AdadeltaState(torch.zeros_like(p), torch.zeros_like(p))

    def rule(
        g: Tensor, state: AdadeltaState, p: Tensor, h: ParamHyper
    ) -> tuple[Tensor, AdadeltaState]:
        rho_, eps_ = h["rho"], h["eps"]
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        second = rho_ * state.second + (1 - rho_) * g * g
        move = safe_sqrt(state.moves + eps_) / safe_sqrt(second + eps_) * g
        moves = rho_ * state.moves + (1 - rho_) * move * move
        return p - h["lr"] * move, AdadeltaState(second, moves)

    hyper = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
