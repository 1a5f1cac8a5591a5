"""Stochastic gradient descent with momentum, as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    Hyper,
    InnerOptimizer,
    Params,
    hyper_for,
    is_off,
    step_count,
    zeros_like,
)


class SGDState(NamedTuple):
    """Momentum buffers (shapes of the parameters) and the number of steps taken."""

    momentum: Params
    step: Tensor


def sgd(
    lr: float | Tensor = 0.01,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
) -> InnerOptimizer:
    """SGD with the update rule of `torch.optim.SGD`.

    A momentum, dampening or weight decay that is the constant 0 costs nothing; a tensor that
    is 0 stays in the graph and can be learned.

    Raises:
        ValueError: nesterov without momentum or with dampening, as in torch.
    """
    if nesterov and (is_off(momentum) or not is_off(dampening)):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")

    def init(params: Params) -> SGDState:
        return SGDState(zeros_like(params), step_count(params))

    def update(
        grads: Params, state: SGDState, params: Params, hyper: Hyper
    ) -> tuple[Params, SGDState]:
        new_params, buffers = {}, {}
        for name, p in params.items():
            decay = hyper_for(hyper, "weight_decay", name)
            mu = hyper_for(hyper, "momentum", name)
            g = grads[name] if is_off(decay) else grads[name] + decay * p
            buffer = state.momentum[name]
            if not is_off(mu):
                damp = hyper_for(hyper, "dampening", name)
                # The first gradient enters undamped: torch's buffer starts as a copy of it.
                fresh = g if is_off(damp) else torch.where(state.step == 0, g, (1 - damp) * g)
                buffer = mu * buffer + fresh
                g = g + mu * buffer if nesterov else buffer
            new_params[name] = p - hyper_for(hyper, "lr", name) * g
            buffers[name] = buffer
        return new_params, SGDState(buffers, state.step + 1)

    hyper = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
    }
    return InnerOptimizer(init, update, hyper)
