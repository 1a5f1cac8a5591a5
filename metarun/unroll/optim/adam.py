"""Adam (Kingma and Ba 2015), AMSGrad and AdamW, as differentiable inner optimizers."""

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


class AdamState(NamedTuple):
    """What Adam remembers of one parameter.

    Attributes:
        first: the first moment, of the parameter's shape.
        second: the second moment, of the parameter's shape.
        max_second: the largest second moment so far under AMSGrad, and empty otherwise.
        step: () float64, the number of steps taken.
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

    With gradient gₜ, in which maximize and weight_decay · θₜ₋₁ are included:

        mₜ = beta1 · mₜ₋₁ + (1 − beta1) · gₜ,    m̂ₜ = mₜ / (1 − beta1ᵗ)
        vₜ = beta2 · vₜ₋₁ + (1 − beta2) · gₜ²,   v̂ₜ = vₜ / (1 − beta2ᵗ)
        θₜ = θₜ₋₁ − lr · m̂ₜ / (√v̂ₜ + eps)

    Derivatives stay finite where a second moment is exactly zero (see `safe_sqrt`).

    Args:
        lr, beta1, beta2, eps, weight_decay: as in torch; numbers, or tensors that broadcast
            against each parameter.
        amsgrad: divide by the largest second moment so far (Reddi, Kale and Kumar 2018).
        maximize: climb instead of descend.
        decoupled_weight_decay: shrink the parameter instead, which is AdamW.

    Returns:
        An `InnerOptimizer`; the first five arguments are its hyperparameters, and its state is
        an `AdamState` (m, v) by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import adam, unroll
        >>> lr, beta1 = torch.tensor([0.1, 0.9], requires_grad=True)
        >>> inner = adam(lr, beta1)
        >>> start = {"w": torch.zeros(1)}
        >>> end = unroll(lambda p, step: (p["w"] - 3).square().sum(), start, inner, steps=3)
        >>> end.params["w"].detach()  # lr a step at first, whatever the gradient
        tensor([0.2996])
        >>> torch.autograd.grad(end.params["w"].sum(), (lr, beta1))
        (tensor(2.9917), tensor(0.0035))

    References:
        Kingma and Ba 2015, Adam: a method for stochastic optimization, algorithm 1.
        Reddi, Kale and Kumar 2018, On the convergence of Adam and beyond (AMSGrad).
    """

    def init(p: Tensor) -> AdamState:
        largest = (torch.zeros_like(p),) if amsgrad else ()
        return AdamState(torch.zeros_like(p), torch.zeros_like(p), largest, step_count(p))

    def rule(g: Tensor, state: AdamState, p: Tensor, h: ParamHyper) -> tuple[Tensor, AdamState]:
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
    """`adam` with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`.

    The step of `adam` without weight decay starts from θₜ₋₁ · (1 − lr · weight_decay).

    Args:
        lr, beta1, beta2, eps, weight_decay, amsgrad, maximize: as of `adam`.

    Returns:
        An `InnerOptimizer`, as that of `adam`.

    Example:
        >>> import torch
        >>> from metarun.unroll import adamw, unroll
        >>> inner = adamw(lr=0.1, weight_decay=0.5)
        >>> unroll(lambda p, step: 0 * p["w"].sum(), {"w": torch.ones(1)}, inner, 2).params["w"]
        tensor([0.9025])

    References:
        Loshchilov and Hutter 2019, Decoupled weight decay regularization.
    """
    return adam(lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay=True)
