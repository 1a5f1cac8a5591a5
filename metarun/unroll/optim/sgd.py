"""Stochastic gradient descent with momentum, as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    decayed_gradient,
    is_off,
    per_parameter,
    signed,
    step_count,
)


class SGDState(NamedTuple):
    """What SGD remembers of one parameter.

    Attributes:
        momentum: the momentum buffer, of the parameter's shape; zeros without momentum.
        step: () float64, the steps that the buffer has taken in: none without momentum.
    """

    momentum: Tensor
    step: Tensor


def sgd(
    lr: float | Tensor = 0.001,
    momentum: float | Tensor = 0.0,
    dampening: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> InnerOptimizer:
    """SGD with the update rule of `torch.optim.SGD`.

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included:

        b₁ = g₁,  bₜ = momentum · bₜ₋₁ + (1 − dampening) · gₜ
        θₜ = θₜ₋₁ − lr · bₜ                     (nesterov: gₜ + momentum · bₜ in place of bₜ)

    Without momentum bₜ = gₜ, whatever the dampening. A momentum, dampening or weight decay that
    is the constant 0 costs nothing; a tensor that is 0 stays in the graph and can be learned.

    Args:
        lr, momentum, dampening, weight_decay: numbers, or tensors that broadcast against each
            parameter. Weight decay is an L2 penalty.
        nesterov: Nesterov's momentum, as above.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; the first four arguments are its hyperparameters, and its state is
        an `SGDState` by parameter name.

    Raises:
        ValueError: nesterov without momentum, or with a number as dampening, as in torch.

    Example:
        >>> import torch
        >>> from metarun.unroll import sgd, unroll
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> start = {"w": torch.zeros(1)}
        >>> end = unroll(lambda p, step: (p["w"] - 3).square().sum(), start, sgd(lr), steps=2)
        >>> end.params["w"]  # 3 − 3 · (1 − 2 lr)²
        tensor([1.0800], grad_fn=<SubBackward0>)
        >>> torch.autograd.grad(end.params["w"].sum(), lr)  # 12 · (1 − 2 lr)
        (tensor(9.6000),)

    References:
        Robbins and Monro 1951, A stochastic approximation method.
        Sutskever et al. 2013, On the importance of initialization and momentum in deep learning
        (Nesterov's momentum).
    """
    # A dampening that is learned may begin at 0, and has its place in the formula.
    damped = not (is_off(dampening) or isinstance(dampening, Tensor))
    if nesterov and (is_off(momentum) or damped):
        raise ValueError("nesterov needs a momentum above 0 and no dampening")

    def init(p: Tensor) -> SGDState:
        return SGDState(torch.zeros_like(p), step_count(p))

    def rule(g: Tensor, state: SGDState, p: Tensor, h: ParamHyper) -> tuple[Tensor, SGDState]:
        g = decayed_gradient(signed(g, maximize), p, h["weight_decay"])
        mu, damp = h["momentum"], h["dampening"]
        if is_off(mu):
            return p - h["lr"] * g, state
        # The first gradient enters undamped: torch's buffer starts as a copy of it, at the first
        # step that has momentum.
        fresh = g if is_off(damp) else torch.where(state.step == 0, g, (1 - damp) * g)
        buffer = mu * state.momentum + fresh
        g = g + mu * buffer if nesterov else buffer
        return p - h["lr"] * g, SGDState(buffer, state.step + 1)

    hyper = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    return per_parameter(init, rule, hyper)
