"""Averaged stochastic gradient descent (Polyak and Juditsky 1992), differentiable."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    as_double,
    decayed_gradient,
    per_parameter,
    signed,
    step_count,
)


class ASGDState(NamedTuple):
    """What ASGD remembers of one parameter.

    Attributes:
        ax: the average of the iterates, of the parameter's shape.
        eta: the next step's step size, (), or the shape that learned hyperparameters give it.
        mu: the weight of the next iterate in the average, (), or the shape of a learned t0.
        step: () float64, the number of steps taken.
    """

    ax: Tensor
    eta: Tensor
    mu: Tensor
    step: Tensor


def asgd(
    lr: float | Tensor = 0.01,
    lambd: float | Tensor = 1e-4,
    alpha: float | Tensor = 0.75,
    t0: float | Tensor = 1e6,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> InnerOptimizer:
    """ASGD with the update rule of `torch.optim.ASGD`; the average is `ax` in the state.

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included, η₁ = lr and μ₁ = 1:

        θₜ = θₜ₋₁ · (1 − lambd · ηₜ) − ηₜ · gₜ
        axₜ = axₜ₋₁ + μₜ · (θₜ − axₜ₋₁)
        ηₜ₊₁ = lr / (1 + lambd · lr · t)^alpha,  μₜ₊₁ = 1 / max(1, t − t0)

    As in torch, the step size eta is computed at the end of a step for the next one, so that a
    changed lr acts one step later. torch keeps eta and mu in its default type; here they start
    in float64, and keep the type that they have in a state that is continued (`from_torch`).

    Args:
        lr, lambd, alpha, weight_decay: numbers, or tensors that broadcast against each
            parameter. Weight decay is an L2 penalty.
        t0: the number of steps before averaging starts.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; the first five arguments are its hyperparameters, and its state is
        an `ASGDState` by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import asgd, unroll
        >>> inner = asgd(lr=0.95, lambd=0.0, t0=0.0)
        >>> end = unroll(lambda p, step: p["w"].square().sum(), {"w": torch.ones(1)}, inner, 10)
        >>> end.params["w"], end.state["w"].ax  # the iterates change sign: their mean is closer
        (tensor([0.3487]), tensor([0.0657]))

    References:
        Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging.
    """

    def init(p: Tensor) -> ASGDState:
        zero = step_count(p)
        return ASGDState(torch.zeros_like(p), zero, torch.ones_like(zero), zero.clone())

    def rule(g: Tensor, state: ASGDState, p: Tensor, h: ParamHyper) -> tuple[Tensor, ASGDState]:
        step, lr_, lambd_ = state.step + 1, as_double(h["lr"], p), as_double(h["lambd"], p)
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        kept = state.eta.dtype
        eta = torch.where(state.step == 0, lr_.to(kept), state.eta).double()
        p = p * (1 - lambd_ * eta).to(p.dtype) - eta.to(p.dtype) * g
        ax = state.ax + (p - state.ax) * state.mu.to(p.dtype)
        next_eta = lr_ / torch.pow(1 + lambd_ * lr_ * step, as_double(h["alpha"], p))
        next_mu = 1 / (step - as_double(h["t0"], p)).clamp(min=1)
        return p, ASGDState(ax, next_eta.to(kept), next_mu.to(kept), step)

    hyper = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
