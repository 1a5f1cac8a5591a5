"""Linear maps of gradients that factorise: Meta-Curvature and Kronecker factors."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.unroll.optim.base import Params

Factors = dict[str, dict[str, Tensor]]
"""Factor -> parameter -> tensor."""


class Preconditioner(NamedTuple):
    """A linear map of gradients, by learned factors.

    Attributes:
        factors: `factors(params)` gives the factors of the identity, in the parameters' type
            and on their device. A parameter has only the factors that its shape calls for, and
            none where it has no elements.
        apply: `apply(grad, factors) -> grad` for one parameter and its factors by name.

    Example:
        >>> import torch
        >>> from metarun.unroll import KRONECKER, META_CURVATURE
        >>> for preconditioner in (META_CURVATURE, KRONECKER):
        ...     factors = preconditioner.factors({"conv": torch.zeros(8, 4, 3, 3)})
        ...     {name: tuple(of["conv"].shape) for name, of in factors.items()}
        {'curvature_out': (8, 8), 'curvature_in': (4, 4), 'curvature_filter': (9, 9)}
        {'kronecker_left': (4, 4), 'kronecker_right': (9, 9)}
    """

    factors: Callable[[Params], Factors]
    apply: Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def _eye(p: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=p.dtype, device=p.device)


def _gathered(params: Params, of_one: Callable[[Tensor], dict[str, Tensor]]) -> Factors:
    gathered: Factors = {}
    for name, p in params.items():
        for key, factor in of_one(p).items() if p.numel() else ():  # nothing to mix
            gathered.setdefault(key, {})[name] = factor
    return gathered


def _curvature_of_one(p: Tensor) -> dict[str, Tensor]:
    if p.dim() < 2:
        return {"curvature_out": torch.ones_like(p)}
    factors = {"curvature_out": _eye(p, p.shape[0]), "curvature_in": _eye(p, p.shape[1])}
    if p.dim() > 2:
        factors["curvature_filter"] = _eye(p, p[0, 0].numel())
    return factors


def _curvature_applied(grad: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    if grad.dim() < 2:
        return factors["curvature_out"] * grad
    # One factor after the other: einsum itself would multiply the two factors first. And never
    # by `@`, which folds dimensions by whether its operands require gradients: a recording that
    # was made with gradients then rounds otherwise.
    product = grad.reshape(*grad.shape[:2], -1)
    product = torch.einsum("ao,oif->aif", factors["curvature_out"], product)
    product = torch.einsum("bi,aif->abf", factors["curvature_in"], product)
    if grad.dim() > 2:
        product = torch.einsum("gf,abf->abg", factors["curvature_filter"], product)
    return product.reshape(grad.shape)


META_CURVATURE = Preconditioner(
    lambda params: _gathered(params, _curvature_of_one), _curvature_applied
)
"""Meta-Curvature (Park and Oliva 2019): mode products with a matrix M_o over
the outputs (first dimension), M_i over the inputs (second) and M_f over the positions in the
filter (the others, as one). Vectors and numbers have a diagonal. The factors are called
`curvature_out`, `curvature_in` and `curvature_filter`."""


def _kronecker_shape(p: Tensor) -> tuple[int, int]:
    """(n, m) of the matrices whose rows and columns the two factors mix."""
    if p.dim() > 2:  # a matrix (inputs, positions in the filter) for each output
        return p.shape[1], p[0, 0].numel()
    return (p.shape[0], p.shape[1]) if p.dim() == 2 else (p.numel(), 1)


def _kronecker_of_one(p: Tensor) -> dict[str, Tensor]:
    n, m = _kronecker_shape(p)
    return {"kronecker_left": _eye(p, n), "kronecker_right": _eye(p, m)}


def _kronecker(psd: bool) -> Preconditioner:
    def applied(grad: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        left, right = factors["kronecker_left"], factors["kronecker_right"]
        if psd:
            left, right = left.T @ left, right.T @ right
        matrices = grad.reshape(-1, *_kronecker_shape(grad))
        product = torch.einsum("ij,njk->nik", left, matrices)  # not by `@`: see above
        return torch.einsum("nik,kl->nil", product, right).reshape(grad.shape)

    return Preconditioner(lambda params: _gathered(params, _kronecker_of_one), applied)


KRONECKER = _kronecker(psd=False)
"""Kronecker-factored linear transform (the KFO of Arnold, Iqbal and Sha 2021): L·G·R for a
gradient G as a matrix, which is (Rᵀ ⊗ L)·vec(G). Weights of convolutions are a matrix (inputs,
positions in the filter) for each output, which share L and R; vectors are columns. The factors
are called `kronecker_left` and `kronecker_right`."""

KRONECKER_PSD = _kronecker(psd=True)
"""`KRONECKER` with LᵀL and RᵀR in place of L and R: a positive semi-definite transform, so that
the preconditioned gradient keeps pointing downhill."""
