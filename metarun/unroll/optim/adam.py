"""Adam (Kingma and Ba 2015), as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    Hyper,
    InnerOptimizer,
    Params,
    hyper_for,
    is_off,
    safe_sqrt,
    step_count,
    zeros_like,
)


class AdamState(NamedTuple):
    """First and second moments (shapes of the parameters) and the number of steps taken."""

    first: Params
    second: Params
    step: Tensor


def adam(
    lr: float | Tensor = 0.001,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
) -> InnerOptimizer:
    """Adam with the update rule of `torch.optim.Adam`: weight decay enters the gradient.

    Derivatives stay finite where a second moment is exactly zero (see `safe_sqrt`).
    """

    def init(params: Params) -> AdamState:
        return AdamState(zeros_like(params), zeros_like(params), step_count(params))

    def update(
        grads: Params, state: AdamState, params: Params, hyper: Hyper
    ) -> tuple[Params, AdamState]:
        step = state.step + 1
        new_params, firsts, seconds = {}, {}, {}
        for name, p in params.items():
            decay = hyper_for(hyper, "weight_decay", name)
            b1, b2 = hyper_for(hyper, "beta1", name), hyper_for(hyper, "beta2", name)
            g = grads[name] if is_off(decay) else grads[name] + decay * p
            first = b1 * state.first[name] + (1 - b1) * g
            second = b2 * state.second[name] + (1 - b2) * g * g
            # Computed in float64 tensors, so that learned betas get their derivative and
            # float32 runs do not lose 1 - beta2 to rounding.
            correction1 = (1 - _power(b1, step)).to(p.dtype)
            correction2 = (1 - _power(b2, step)).sqrt().to(p.dtype)
            eps_ = hyper_for(hyper, "eps", name)
            denominator = safe_sqrt(second) / correction2 + eps_
            new_params[name] = p - hyper_for(hyper, "lr", name) * (
                first / correction1 / denominator
            )
            firsts[name], seconds[name] = first, second
        return new_params, AdamState(firsts, seconds, step)

    hyper = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
    }
    return InnerOptimizer(init, update, hyper)


def _power(base: float | Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent in float64."""
    if isinstance(base, Tensor):
        base = base.double()
    return torch.pow(base, exponent)
