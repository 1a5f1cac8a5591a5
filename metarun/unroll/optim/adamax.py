"""Adamax: Adam by the infinity norm (Kingma and Ba 2015, section 7.1), differentiable."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    decayed_gradient,
    per_parameter,
    power,
    signed,
    step_count,
)


class AdamaxState(NamedTuple):
    """What Adamax remembers of one parameter.

    Attributes:
        first: the first moment, of the parameter's shape.
        norm: the decayed infinity norm of the gradients, of the parameter's shape.
        step: () float64, the number of steps taken.
    """

    first: Tensor
    norm: Tensor
    step: Tensor


def adamax(
    lr: float | Tensor = 0.002,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> InnerOptimizer:
    """Adamax with the update rule of `torch.optim.Adamax`.

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included:

        mₜ = beta1 · mₜ₋₁ + (1 − beta1) · gₜ
        uₜ = max(beta2 · uₜ₋₁, |gₜ| + eps)
        θₜ = θₜ₋₁ − lr / (1 − beta1ᵗ) · mₜ / uₜ

    Args:
        lr, beta1, beta2, eps, weight_decay: numbers, or tensors that broadcast against each
            parameter. Weight decay is an L2 penalty.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; the first five arguments are its hyperparameters, and its state is
        an `AdamaxState` (m, u) by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import adamax, unroll
        >>> start = {"w": torch.tensor([1.0, 100.0])}
        >>> end = unroll(lambda p, step: p["w"].square().sum(), start, adamax(lr=0.1), steps=1)
        >>> end.params["w"] - start["w"]
        tensor([-0.1000, -0.1000])

    References:
        Kingma and Ba 2015, Adam: a method for stochastic optimization, section 7.1.
    """

    def init(p: Tensor) -> AdamaxState:
        return AdamaxState(torch.zeros_like(p), torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: AdamaxState, p: Tensor, h: ParamHyper) -> tuple[Tensor, AdamaxState]:
        step, b1 = state.step + 1, h["beta1"]
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        first = b1 * state.first + (1 - b1) * g
        norm = torch.maximum(h["beta2"] * state.norm, g.abs() + h["eps"])
        move = first / ((1 - power(b1, step)).to(p.dtype) * norm)
        return p - h["lr"] * move, AdamaxState(first, norm, step)

    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
