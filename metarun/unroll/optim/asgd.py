"""Averaged stochastic gradient descent (Polyak and Juditsky 1992), differentiable."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    Settings,
    as_double,
    decayed_gradient,
    per_parameter,
    signed,
    step_count,
)


class ASGDState(NamedTuple):
    """Of one parameter: its average `ax` (its shape), the next step's `eta` and `mu`, steps."""

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

    As in torch, the step size eta is computed at the end of a step for the next one, so that a
    changed lr acts one step later. torch keeps eta and mu in its default type; here they start
    in float64, and keep the type that they have in a state that is continued (`from_torch`).
    """

    def init(p: Tensor) -> ASGDState:
        zero = step_count(p)
        return ASGDState(torch.zeros_like(p), zero, torch.ones_like(zero), zero.clone())

    def rule(g: Tensor, state: ASGDState, p: Tensor, h: Settings) -> tuple[Tensor, ASGDState]:
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
