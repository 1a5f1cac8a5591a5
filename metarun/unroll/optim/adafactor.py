"""Adafactor (Shazeer and Stern 2018), as a differentiable inner optimizer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    HyperValue,
    InnerOptimizer,
    ParamHyper,
    as_double,
    decayed_param,
    per_parameter,
    safe_norm,
    signed,
    step_count,
)


class AdafactorState(NamedTuple):
    """What Adafactor remembers of one parameter.

    Attributes:
        second: the second moment: (rows (…, n, 1), columns (…, 1, m)) for a parameter of shape
            (…, n, m), and one tensor of the parameter's shape for a vector or a scalar.
        step: () float64, the number of steps taken.
    """

    second: tuple[Tensor, ...]
    step: Tensor


def adafactor(
    lr: float | Tensor = 0.01,
    beta2_decay: float | Tensor = -0.8,
    eps1: float | Tensor | None = None,
    eps2: float | Tensor = 1e-3,
    d: float | Tensor = 1.0,
    weight_decay: float | Tensor = 0.0,
    maximize: bool = False,
) -> InnerOptimizer:
    """Adafactor with the update rule of `torch.optim.Adafactor`.

    With gradient Gₜ of a matrix θ, where RMS is the root of the mean square of all elements:

        Rₜ = Rₜ₋₁ + t^beta2_decay · (row means of Gₜ² − Rₜ₋₁), and so the columns Cₜ
        Vₜ = Rₜ Cₜ / max(mean(Rₜ), eps1),  Uₜ = Gₜ / √max(Vₜ, eps1²)
        αₜ = max(eps2, RMS(θₜ₋₁)) · min(lr, 1/√t)
        θₜ = θₜ₋₁ · (1 − lr · weight_decay) − αₜ · Uₜ / max(1, RMS(Uₜ) / d)

    A vector has the moving average of Gₜ² itself for Vₜ.

    Args:
        lr: the largest relative step size.
        beta2_decay: exponent of the decay of the second moment.
        eps1: lower bound of the root of the second moment; None takes the machine epsilon of
            the parameter's type, and is then no hyperparameter.
        eps2: lower bound of the parameter's root mean square.
        d: threshold at which updates are clipped.
        weight_decay: decoupled.
        maximize: climb instead of descend.

    Returns:
        An `InnerOptimizer`; all arguments but `maximize` are its hyperparameters, and its state
        is an `AdafactorState` by parameter name.

    Raises:
        ValueError: from `init` and `update`: a complex parameter.

    Example:
        >>> import torch
        >>> from metarun.unroll import adafactor
        >>> state = adafactor().init({"weight": torch.ones(5, 3)})
        >>> [tuple(x.shape) for x in state["weight"].second]  # n + m numbers, not n · m
        [(5, 1), (1, 3)]

    References:
        Shazeer and Stern 2018, Adafactor: adaptive learning rates with sublinear memory cost.
    """

    def init(p: Tensor) -> AdafactorState:
        if p.dim() > 1:
            rows, columns = torch.zeros_like(p[..., :1]), torch.zeros_like(p[..., :1, :])
            return AdafactorState((rows, columns), step_count(p))
        return AdafactorState((torch.zeros_like(p),), step_count(p))

    def rule(
        g: Tensor, state: AdafactorState, p: Tensor, h: ParamHyper
    ) -> tuple[Tensor, AdafactorState]:
        step = state.step + 1
        if not p.numel():  # it has no mean
            return p, state._replace(step=step)
        eps = h["eps1"] if "eps1" in h else torch.finfo(p.dtype).eps
        g = signed(g, maximize)
        fresh = torch.pow(step, as_double(h["beta2_decay"], p)).to(p.dtype)
        relative = torch.minimum(as_double(h["lr"], p), step.rsqrt())
        size = _root_mean_square(p).double().clamp(min=h["eps2"]) * relative
        means: tuple[Tensor, ...] = (g * g,)
        if p.dim() > 1:
            means = ((g * g).mean(dim=-1, keepdim=True), (g * g).mean(dim=-2, keepdim=True))
        second = tuple(  # the mean itself where nothing is kept, however large the old one is
            torch.lerp(old, mean, fresh) for old, mean in zip(state.second, means, strict=True)
        )
        if p.dim() > 1:
            rows, columns = second
            estimate = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps)
        else:
            estimate = second[0]
        update = estimate.clamp(min=eps * eps).rsqrt() * g
        clip = (_root_mean_square(update).double() / h["d"]).clamp(min=1)
        p = decayed_param(p, h["lr"], h["weight_decay"])
        return p - (size / clip).to(p.dtype) * update, AdafactorState(second, step)

    hyper: dict[str, HyperValue] = {
        "lr": lr,
        "beta2_decay": beta2_decay,
        **({} if eps1 is None else {"eps1": eps1}),
        "eps2": eps2,
        "d": d,
        "weight_decay": weight_decay,
    }
    return per_parameter(init, rule, hyper, real_only="adafactor")


def _root_mean_square(x: Tensor) -> Tensor:
    return safe_norm(x) / math.sqrt(x.numel())
