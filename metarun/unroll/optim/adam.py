"""Adam (Kingma and Ba 2015), AMSGrad and AdamW, as differentiable inner optimizers."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    Settings,
    decayed_gradient,
    decayed_param,
    per_parameter,
    power,
    safe_sqrt,
    signed,
    step_count,
)


class AdamState(NamedTuple):
    """Of one parameter: moments (its shape) and number of steps taken.

    `max_second` holds the largest second moment so far under AMSGrad, and is empty otherwise.
    """

    first: Tensor
    second: Tensor
    max_second: tuple[Tensor, ...]
    step: Tensor


def adam(
    lr: float | Tensor = 0.001,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> InnerOptimizer:
    """Adam with the update rule of `torch.optim.Adam`: weight decay enters the gradient.

    Derivatives stay finite where a second moment is exactly zero (see `safe_sqrt`).

    Args:
        lr, beta1, beta2, eps, weight_decay: as in torch.
        amsgrad: divide by the largest second moment so far (Reddi, Kale and Kumar 2018).
        maximize: climb instead of descend.
        decoupled_weight_decay: shrink the parameter instead, which is AdamW.
    """

    def init(p: Tensor) -> AdamState:
        largest = (torch.zeros_like(p),) if amsgrad else ()
        return AdamState(torch.zeros_like(p), torch.zeros_like(p), largest, step_count(p))

    def rule(g: Tensor, state: AdamState, p: Tensor, h: Settings) -> tuple[Tensor, AdamState]:
        step, b1, b2, decay = state.step + 1, h["beta1"], h["beta2"], h["weight_decay"]
        g = signed(g, maximize)
        if decoupled_weight_decay:
            p = decayed_param(p, h["lr"], decay)
        else:
            g = decayed_gradient(g, p, decay)
        first = b1 * state.first + (1 - b1) * g
        second = b2 * state.second + (1 - b2) * g * g
        largest = tuple(torch.maximum(old, second) for old in state.max_second)
        root = safe_sqrt(largest[0] if amsgrad else second)
        correction1 = (1 - power(b1, step)).to(p.dtype)
        correction2 = (1 - power(b2, step)).sqrt().to(p.dtype)
        move = first / correction1 / (root / correction2 + h["eps"])
        return p - h["lr"] * move, AdamState(first, second, largest, step)

    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)


def adamw(
    lr: float | Tensor = 0.001,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.01,
    amsgrad: bool = False,
    maximize: bool = False,
) -> InnerOptimizer:
    """`adam` with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`."""
    return adam(lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay=True)
