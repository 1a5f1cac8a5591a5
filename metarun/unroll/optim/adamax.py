"""Adamax: Adam by the infinity norm (Kingma and Ba 2015, section 7.1), differentiable."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    Settings,
    decayed_gradient,
    per_parameter,
    power,
    signed,
    step_count,
)


class AdamaxState(NamedTuple):
    """Of one parameter: first moment and infinity norm (its shape), number of steps taken."""

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
    """Adamax with the update rule of `torch.optim.Adamax`."""

    def init(p: Tensor) -> AdamaxState:
        return AdamaxState(torch.zeros_like(p), torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: AdamaxState, p: Tensor, h: Settings) -> tuple[Tensor, AdamaxState]:
        step, b1 = state.step + 1, h["beta1"]
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        first = b1 * state.first + (1 - b1) * g
        norm = torch.maximum(h["beta2"] * state.norm, g.abs() + h["eps"])
        move = first / ((1 - power(b1, step)).to(p.dtype) * norm)
        return p - h["lr"] * move, AdamaxState(first, norm, step)

    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
