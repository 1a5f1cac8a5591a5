"""NAdam: Adam with Nesterov momentum (Dozat 2016), as a differentiable inner optimizer."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    decayed_gradient,
    decayed_param,
    per_parameter,
    power,
    safe_sqrt,
    signed,
    step_count,
)


class NAdamState(NamedTuple):
    """What NAdam remembers of one parameter.

    Attributes:
        first: the first moment, of the parameter's shape.
        second: the second moment, of the parameter's shape.
        mu_product: the product of all momenta so far, (), or the shape that learned hyperparameters
            give it.
        step: () float64, the number of steps taken.
    """

    first: Tensor
    second: Tensor
    mu_product: Tensor
    step: Tensor


def nadam(
    lr: float | Tensor = 0.002,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    momentum_decay: float | Tensor = 0.004,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> InnerOptimizer:
    """NAdam with the update rule of `torch.optim.NAdam`.

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included, and with mₜ and vₜ
    of `adam`:

        μₜ = beta1 · (1 − 0.5 · 0.96^(t · momentum_decay)),  Πₜ = μ₁ · … · μₜ
        θₜ = θₜ₋₁ − lr · ((1 − μₜ) / (1 − Πₜ) · gₜ + μₜ₊₁ / (1 − Πₜ₊₁) · mₜ)
             / (√(vₜ / (1 − beta2ᵗ)) + eps)

    torch keeps the product of the momenta in its default type; here it starts in float64, and
    keeps the type that it has in a state that is continued (see `from_torch`).

    Args:
        lr, beta1, beta2, eps, weight_decay, momentum_decay: numbers, or tensors that broadcast
            against each parameter.
        maximize: climb instead of descend.
        decoupled_weight_decay: shrink the parameter, as AdamW does, in place of an L2 penalty.

    Returns:
        An `InnerOptimizer`; the first six arguments are its hyperparameters, and its state is an
        `NAdamState` by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import nadam, unroll
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> start = {"w": torch.zeros(1)}
        >>> end = unroll(lambda p, step: (p["w"] - 3).square().sum(), start, nadam(lr), steps=3)
        >>> end.params["w"].detach(), torch.autograd.grad(end.params["w"].sum(), lr)
        (tensor([0.2541]), (tensor(2.5091),))

    References:
        Dozat 2016, Incorporating Nesterov momentum into Adam.
    """

    def init(p: Tensor) -> NAdamState:
        one = torch.ones_like(step_count(p))
        return NAdamState(torch.zeros_like(p), torch.zeros_like(p), one, step_count(p))

    def rule(g: Tensor, state: NAdamState, p: Tensor, h: ParamHyper) -> tuple[Tensor, NAdamState]:
        step, b1, b2, lr = state.step + 1, h["beta1"], h["beta2"], h["lr"]
        g = signed(g, maximize)
        if decoupled_weight_decay:
            p = decayed_param(p, lr, h["weight_decay"])
        else:
            g = decayed_gradient(g, p, h["weight_decay"])
        first = b1 * state.first + (1 - b1) * g
        second = b2 * state.second + (1 - b2) * g * g
        mu, mu_next = (
            b1 * (1 - 0.5 * power(0.96, t * h["momentum_decay"])) for t in (step, step + 1)
        )
        product = state.mu_product * mu.to(state.mu_product.dtype)
        of_gradient = (1 - mu) / (1 - product.double())
        of_first = mu_next / (1 - product.double() * mu_next)
        denominator = safe_sqrt(second / (1 - power(b2, step)).to(p.dtype)) + h["eps"]
        move = (of_gradient.to(p.dtype) * g + of_first.to(p.dtype) * first) / denominator
        return p - lr * move, NAdamState(first, second, product, step)

    hyper = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": momentum_decay,
    }
    return per_parameter(init, rule, hyper)
