"""Rprop (Riedmiller and Braun 1993), as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    per_parameter,
    signed,
    step_count,
)


class RpropState(NamedTuple):
    """What Rprop remembers of one parameter.

    Attributes:
        previous: the last gradient, zero where its sign had changed, of the parameter's shape.
        step_size: the last step size, of the parameter's shape.
        step: () float64, the number of steps taken.
    """

    previous: Tensor
    step_size: Tensor
    step: Tensor


def rprop(
    lr: float | Tensor = 0.01,
    eta_minus: float | Tensor = 0.5,
    eta_plus: float | Tensor = 1.2,
    step_size_min: float | Tensor = 1e-6,
    step_size_max: float | Tensor = 50.0,
    maximize: bool = False,
) -> InnerOptimizer:
    """Rprop with the update rule of `torch.optim.Rprop`.

    With gradient gₜ and step sizes s of each element, s₀ = lr:

        sₜ = sₜ₋₁ · (eta_plus if gₜ · gₜ₋₁ > 0, eta_minus if gₜ · gₜ₋₁ < 0, otherwise 1),
             within step_size_min and step_size_max
        gₜ = 0 where gₜ · gₜ₋₁ < 0
        θₜ = θₜ₋₁ − sign(gₜ) · sₜ

    Only the signs of the gradients count, so the result is piecewise constant in them: the
    derivatives with respect to `lr` (the first step size), the etas and the limits are those of
    the piece, and none flows through the gradients.

    Args:
        lr, eta_minus, eta_plus, step_size_min, step_size_max: numbers, or tensors that broadcast
            against each parameter.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; all arguments but `maximize` are its hyperparameters, and its state
        is an `RpropState` by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import rprop, unroll
        >>> start = {"w": torch.tensor([1.0, 100.0])}
        >>> end = unroll(lambda p, step: p["w"].square().sum(), start, rprop(lr=0.5), steps=3)
        >>> start["w"] - end.params["w"]  # 0.5 + 0.6 − 0 and 0.5 + 0.6 + 0.72
        tensor([1.1000, 1.8200])
        >>> end.state["w"].step_size
        tensor([0.3000, 0.7200])

    References:
        Riedmiller and Braun 1993, A direct adaptive method for faster backpropagation learning:
        the RPROP algorithm.
    """

    def init(p: Tensor) -> RpropState:
        return RpropState(torch.zeros_like(p), torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: RpropState, p: Tensor, h: ParamHyper) -> tuple[Tensor, RpropState]:
        g = signed(g, maximize)
        agreement = g * state.previous
        grown = torch.where(agreement > 0, h["eta_plus"], torch.ones_like(p))
        factor = torch.where(agreement < 0, h["eta_minus"], grown).to(p.dtype)
        # Read here, not in `init`, so that the lr is a hyperparameter like the others.
        start = torch.where(state.step == 0, h["lr"], state.step_size).to(p.dtype)
        size = (start * factor).clamp(min=h["step_size_min"]).clamp(max=h["step_size_max"])
        g = torch.where(agreement < 0, 0.0, g)
        return p - g.sign() * size, RpropState(g, size, state.step + 1)

    hyper = {
        "lr": lr,
        "eta_minus": eta_minus,
        "eta_plus": eta_plus,
        "step_size_min": step_size_min,
        "step_size_max": step_size_max,
    }
    return per_parameter(init, rule, hyper)
