"""RMSprop (Tieleman and Hinton 2012), plain or centred, as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    decayed_gradient,
    is_off,
    per_parameter,
    safe_sqrt,
    signed,
)


class RMSpropState(NamedTuple):
    """What RMSprop remembers of one parameter.

    Attributes:
        second: the average of squared gradients, of the parameter's shape.
        momentum: the momentum buffer, of the parameter's shape; zeros without momentum.
        first: (the average gradient,) if centred, and empty otherwise.
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

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included:

        vₜ = alpha · vₜ₋₁ + (1 − alpha) · gₜ²
        ḡₜ = alpha · ḡₜ₋₁ + (1 − alpha) · gₜ if centred, and 0 otherwise
        bₜ = momentum · bₜ₋₁ + gₜ / (√(vₜ − ḡₜ²) + eps)
        θₜ = θₜ₋₁ − lr · bₜ

    A centred variance that rounding makes negative counts as zero; torch's root is NaN there.

    Args:
        lr, alpha, eps, weight_decay, momentum: numbers, or tensors that broadcast against each
            parameter. Weight decay is an L2 penalty.
        centered: divide by the standard deviation of the gradients, not by their size.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; the first five arguments are its hyperparameters, and its state is
        an `RMSpropState` by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import rmsprop, unroll
        >>> start = {"w": torch.tensor([1.0, 100.0])}
        >>> end = unroll(lambda p, step: p["w"].square().sum(), start, rmsprop(lr=0.1), steps=1)
        >>> end.params["w"] - start["w"]  # lr / √(1 − alpha) each
        tensor([-1.0000, -1.0000])

    References:
        Tieleman and Hinton 2012, Lecture 6.5 of Neural networks for machine learning.
        Graves 2013, Generating sequences with recurrent neural networks (centred).
    """

    def init(p: Tensor) -> RMSpropState:
        first = (torch.zeros_like(p),) if centered else ()
        return RMSpropState(torch.zeros_like(p), torch.zeros_like(p), first)

    def rule(
        g: Tensor, state: RMSpropState, p: Tensor, h: ParamHyper
    ) -> tuple[Tensor, RMSpropState]:
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
