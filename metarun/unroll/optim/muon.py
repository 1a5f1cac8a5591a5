"""Muon: orthogonalised momentum (Jordan et al. 2024), as a differentiable inner optimizer."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    InnerOptimizer,
    ParamHyper,
    Params,
    decayed_param,
    per_parameter,
    safe_norm,
)

AdjustLr = Literal["original", "match_rms_adamw", "spectral_unclamped"]
Precision = Literal["bfloat16", "full"]

_LR_FACTOR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral_unclamped": lambda rows, columns: (rows / columns) ** 0.5,
}


class MuonState(NamedTuple):
    """What Muon remembers of one parameter.

    Attributes:
        momentum: the momentum buffer, of the parameter's shape.
    """

    momentum: Tensor


def muon(
    lr: float | Tensor = 0.001,
    weight_decay: float | Tensor = 0.1,
    momentum: float | Tensor = 0.95,
    nesterov: bool = True,
    ns_a: float | Tensor = 3.4445,
    ns_b: float | Tensor = -4.775,
    ns_c: float | Tensor = 2.0315,
    eps: float | Tensor = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: AdjustLr | None = None,
    ns_precision: Precision = "bfloat16",
) -> InnerOptimizer:
    """Muon with the update rule of `torch.optim.Muon`, for parameters of two dimensions.

    With gradient Gₜ of a parameter θ of shape (n, m):

        Bₜ = momentum · Bₜ₋₁ + (1 − momentum) · Gₜ
        Mₜ = Gₜ + momentum · (Bₜ − Gₜ) with nesterov, otherwise Bₜ
        Oₜ = NewtonSchulz(Mₜ), near the orthogonal matrix that is nearest to Mₜ
        θₜ = θₜ₋₁ · (1 − lr · weight_decay) − lr · factor(n, m) · Oₜ

    NewtonSchulz divides by the norm and iterates X ← ns_a·X + (ns_b·A + ns_c·A²)·X with
    A = X·Xᵀ, on the wide side. The factor of `adjust_lr_fn` is √max(1, n/m) for "original",
    0.2·√max(n, m) for "match_rms_adamw" and √(n/m) for "spectral_unclamped".

    Args:
        lr, momentum, nesterov: as in torch.
        weight_decay: decoupled, and not scaled by `adjust_lr_fn`, as in torch.
        ns_a, ns_b, ns_c: coefficients of the Newton-Schulz polynomial.
        eps: lower bound of the norm by which the momentum is divided.
        ns_steps: Newton-Schulz iterations, below 100.
        adjust_lr_fn: how the lr depends on the shape; None is "original".
        ns_precision: "bfloat16" iterates in bfloat16, as torch does. Values are then torch's
            own, but derivatives (and the agreement of a loop with vmap) have two to three
            digits. "full" iterates in the parameters' type.

    Returns:
        An `InnerOptimizer` with the hyperparameters lr, weight_decay, momentum, ns_a, ns_b, ns_c
        and eps; its state is a `MuonState` by parameter name.

    Raises:
        ValueError: an unknown `adjust_lr_fn` or `ns_precision`, too many iterations or a tensor of
            them; from `init`, a parameter that is complex or not a matrix.

    Example:
        >>> import torch
        >>> from metarun.unroll import muon, unroll
        >>> inner = muon(lr=1.0, weight_decay=0.0, ns_precision="full")
        >>> target, start = torch.diag(torch.tensor([9.0, 1.0])), {"w": torch.zeros(2, 2)}
        >>> end = unroll(lambda p, step: (p["w"] - target).square().sum(), start, inner, 1)
        >>> torch.linalg.svdvals(end.params["w"]).round(decimals=1)  # of the gradient: 18 and 2
        tensor([0.8000, 0.7000])

    References:
        Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.
    """
    for option, value, kinds in (
        ("adjust_lr_fn", adjust_lr_fn or "original", AdjustLr),
        ("ns_precision", ns_precision, Precision),
    ):
        if value not in get_args(kinds):
            allowed = ", ".join(get_args(kinds))
            raise ValueError(f"unknown {option} {value!r}: choose one of {allowed}")
    if isinstance(ns_steps, Tensor):
        raise ValueError("ns_steps counts iterations and cannot be learned: give a whole number")
    if not 0 <= ns_steps < 100:
        raise ValueError(f"ns_steps must be from 0 to 99, not {ns_steps}")

    def rule(g: Tensor, state: MuonState, p: Tensor, h: ParamHyper) -> tuple[Tensor, MuonState]:
        if not p.numel():  # it has no shape by which a rate could be adjusted
            return p, state
        mu = h["momentum"]
        buffer = mu * state.momentum + (1 - mu) * g
        update = g + mu * (buffer - g) if nesterov else buffer
        if ns_precision == "bfloat16":
            update = update.to(torch.bfloat16)
        update = _orthogonalised(update, h, ns_steps).to(p.dtype)
        factor = _LR_FACTOR[adjust_lr_fn or "original"](p.shape[0], p.shape[1])
        moved = decayed_param(p, h["lr"], h["weight_decay"]) - h["lr"] * factor * update
        return moved, MuonState(buffer)

    hyper = {
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "ns_a": ns_a,
        "ns_b": ns_b,
        "ns_c": ns_c,
        "eps": eps,
    }
    fresh = lambda p: MuonState(torch.zeros_like(p))  # noqa: E731
    of_matrices = per_parameter(fresh, rule, hyper, real_only="muon")

    def init(params: Params) -> dict[str, MuonState]:
        for name, p in params.items():
            if p.dim() != 2:
                raise ValueError(
                    f"muon takes parameters of two dimensions only, and {name} has the shape "
                    f"{tuple(p.shape)}: give the others another optimizer (`partition` in Python, "
                    "inner_opt=partition on the command line)"
                )
        states: dict[str, MuonState] = of_matrices.init(params)
        return states

    return of_matrices._replace(init=init)


def _orthogonalised(x: Tensor, h: ParamHyper, steps: int) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, on the wide side."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / safe_norm(x).clamp(min=h["eps"])
    for _ in range(steps):
        gram = x @ x.T
        x = _combined(h["ns_a"], x, 1.0, _combined(h["ns_b"], gram, h["ns_c"], gram, gram), x)
    return x.T if tall else x


def _combined(
    beta: float | Tensor, x: Tensor, alpha: float | Tensor, y: Tensor, z: Tensor
) -> Tensor:
    """beta·x + alpha·y·z."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return beta * x + alpha * (y @ z)
    # One rounding instead of three, which in bfloat16 is the difference between torch's values
    # and others.
    return torch.addmm(x, y, z, beta=beta, alpha=alpha)
