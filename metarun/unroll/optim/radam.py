"""RAdam: rectified Adam (Liu et al. 2020), as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    as_double,
    decayed_gradient,
    decayed_param,
    per_parameter,
    power,
    safe_sqrt,
    signed,
    step_count,
)


class RAdamState(NamedTuple):
    """What RAdam remembers of one parameter.

    Attributes:
        first: the first moment, of the parameter's shape.
        second: the second moment, of the parameter's shape.
        step: () float64, the number of steps taken.
    """

    first: Tensor
    second: Tensor
    step: Tensor


def radam(
    lr: float | Tensor = 0.001,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> InnerOptimizer:
    """RAdam with the update rule of `torch.optim.RAdam`.

    With m̂ₜ and vₜ of `adam`:

        ρ∞ = 2 / (1 − beta2) − 1,  ρₜ = ρ∞ − 2t · beta2ᵗ / (1 − beta2ᵗ)
        rₜ = √((ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ))
        θₜ = θₜ₋₁ − lr · m̂ₜ · rₜ · √(1 − beta2ᵗ) / (√vₜ + eps)  if ρₜ > 5
        θₜ = θₜ₋₁ − lr · m̂ₜ                                      otherwise

    The rectification sets in where the length of the approximated average, ρₜ, exceeds 5; in
    beta2 the update jumps there, and the derivative is that of the side it is on.

    Args:
        lr, beta1, beta2, eps, weight_decay: numbers, or tensors that broadcast against each
            parameter.
        maximize: climb instead of descend.
        decoupled_weight_decay: shrink the parameter, as AdamW does, in place of an L2 penalty.

    Returns:
        An `InnerOptimizer`; the first five arguments are its hyperparameters, and its state is
        an `RAdamState` (m, v) by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import radam, unroll
        >>> start = {"w": torch.tensor([1.0, 100.0])}
        >>> end = unroll(lambda p, step: p["w"].sum(), start, radam(lr=0.1), steps=6)
        >>> end.params["w"] - start["w"]  # five steps by the mean gradient, one rectified
        tensor([-0.5026, -0.5026])

    References:
        Liu et al. 2020, On the variance of the adaptive learning rate and beyond, algorithm 2
        (with 4 for the 5 that is torch's).
    """

    def init(p: Tensor) -> RAdamState:
        return RAdamState(torch.zeros_like(p), torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: RAdamState, p: Tensor, h: ParamHyper) -> tuple[Tensor, RAdamState]:
        step, b1, b2, lr = state.step + 1, h["beta1"], h["beta2"], h["lr"]
        g = signed(g, maximize)
        if decoupled_weight_decay:
            p = decayed_param(p, lr, h["weight_decay"])
        else:
            g = decayed_gradient(g, p, h["weight_decay"])
        first = b1 * state.first + (1 - b1) * g
        second = b2 * state.second + (1 - b2) * g * g
        correction2 = 1 - power(b2, step)
        rectified, rectification = _rectification(as_double(b2, step), step, correction2)
        adaptive = correction2.sqrt().to(p.dtype) / (safe_sqrt(second) + h["eps"])
        scale = torch.where(rectified, rectification.to(p.dtype) * adaptive, 1.0)
        move = first / (1 - power(b1, step)).to(p.dtype) * scale
        return p - lr * move, RAdamState(first, second, step)

    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)


def _rectification(beta2: Tensor, step: Tensor, correction2: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the variance is tractable, and the factor r_t (algorithm 2 of the paper)."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * power(beta2, step) / correction2
    tractable = length > 5
    # Where it is not, stand-ins keep root and quotient, and so their derivatives, finite.
    length = torch.where(tractable, length, 6.0)
    longest = torch.where(tractable, longest, 7.0)
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return tractable, ratio.sqrt()
