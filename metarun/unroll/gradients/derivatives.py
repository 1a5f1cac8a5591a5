"""Gradients and Hessians of a loss on demand, for loss-driven optimizers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from metarun.unroll.advice import explained
from metarun.unroll.corrected.graph_check import refuse_wrong_derivatives
from metarun.unroll.optim.base import Derivatives, Params


def derivatives_of(
    loss_fn: Callable[[Params], Tensor], params: Params, *, constant: bool = False
) -> Derivatives:
    """The derivatives of a pure function, by `torch.func`.

    They are themselves functions of `params` and of whatever `loss_fn` closes over, and can be
    differentiated and batched by `torch.autograd` and `torch.func`. Hessians are made of
    Hessian-vector products, batched by vmap, in reverse mode twice: several losses and
    attention kernels have no forward-mode derivative.

    Args:
        loss_fn: gives a scalar.
        params: the point.
        constant: treat loss, gradient and Hessians as constants in any later differentiation,
            and keep no graph for it (first order).
    """
    return _OfFunction(loss_fn, params, constant)


def derivatives_of_value(loss: Tensor, params: Params) -> Derivatives:
    """The derivatives of a loss that has been computed, by `torch.autograd` with a new graph.

    Args:
        loss: a scalar with a graph.
        params: tensors of that graph.

    Raises:
        ValueError: the loss is not a scalar, or does not depend on one of `params`, or one of them
            requires no gradient; or torch's derivatives of it would be wrong, here for those of
            the gradient, and from Hessians for those of Hessians.
    """
    return _OfValue(loss, params)


class _OfFunction:
    def __init__(self, loss_fn: Callable[[Params], Tensor], params: Params, constant: bool) -> None:
        self._loss_fn, self._params, self._constant = loss_fn, params, constant
        with self._graph():
            found: tuple[Params, Tensor] = torch.func.grad_and_value(loss_fn)(params)
        self._gradient, self.loss = found

    def gradient(self) -> Params:
        return self._gradient

    def hessian(self, name: str) -> Tensor:
        with self._graph():
            (rows,) = self._products([name], _basis_of_last_dimension(self._params[name]))
        return rows.reshape(-1, *_at_least_1d(self._params[name]).shape).movedim(0, -2)

    def joint_hessian(self, names: Sequence[str]) -> Tensor:
        params = [self._params[name] for name in names]
        with self._graph():
            products = self._products(names, *_joint_basis(params))
        return torch.cat([rows.reshape(len(rows), -1) for rows in products], dim=1)

    def _products(self, names: Sequence[str], *directions: Tensor) -> tuple[Tensor, ...]:
        """Hessian-vector products with a stack of directions, one tensor a parameter."""

        def gradient_at(*values: Tensor) -> tuple[Tensor, ...]:
            point = self._params | dict(zip(names, values, strict=True))
            gradient = torch.func.grad(self._loss_fn)(point)
            return tuple(gradient[name] for name in names)

        pullback = torch.func.vjp(gradient_at, *(self._params[name] for name in names))[1]
        products: tuple[Tensor, ...] = torch.func.vmap(pullback)(directions)
        return products

    def _graph(self) -> AbstractContextManager[Any]:
        # `torch.func` differentiates within its own level whatever surrounds it: no_grad only
        # keeps the levels outside from recording.
        return torch.no_grad() if self._constant else nullcontext()


class _OfValue:
    def __init__(self, loss: Tensor, params: Params) -> None:
        if loss.dim():
            raise ValueError(f"the loss must be a scalar, not of shape {tuple(loss.shape)}")
        self.loss, self._params = loss, params
        if constants := [name for name, p in params.items() if not p.requires_grad]:
            raise ValueError(f"{', '.join(constants)}: must require gradients")
        gradients: tuple[Tensor | None, ...] = (None,) * len(params)
        if loss.requires_grad:
            refuse_wrong_derivatives(loss, params.values(), order=2)
            leaves = tuple(params.values())
            with explained():
                gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        unused = [n for n, g in zip(params, gradients, strict=True) if g is None]
        if unused:
            raise ValueError(f"the loss does not depend on {', '.join(unused)}")
        self._gradient = {n: g for n, g in zip(params, gradients, strict=True) if g is not None}

    def gradient(self) -> Params:
        return self._gradient

    def hessian(self, name: str) -> Tensor:
        refuse_wrong_derivatives(self.loss, self._params.values(), order=3)
        p = self._params[name]
        directions = _basis_of_last_dimension(p)
        rows = [self._product([name], [v])[0] for v in directions]
        return torch.stack(rows).reshape(-1, *_at_least_1d(p).shape).movedim(0, -2)

    def joint_hessian(self, names: Sequence[str]) -> Tensor:
        refuse_wrong_derivatives(self.loss, self._params.values(), order=3)
        directions = _joint_basis([self._params[name] for name in names])
        products = [self._product(names, vs) for vs in zip(*directions, strict=True)]
        return torch.stack([torch.cat([row.flatten() for row in rows]) for rows in products])

    def _product(self, names: Sequence[str], direction: Sequence[Tensor]) -> tuple[Tensor, ...]:
        params = [self._params[name] for name in names]
        pairs = [
            (self._gradient[name], v)
            for name, v in zip(names, direction, strict=True)
            if self._gradient[name].requires_grad  # not where the loss is linear
        ]
        if not pairs:
            return tuple(torch.zeros_like(p) for p in params)
        gradients, vectors = zip(*pairs, strict=True)
        with explained():
            return torch.autograd.grad(
                gradients, params, vectors, create_graph=True, materialize_grads=True
            )


def _at_least_1d(p: Tensor) -> Tensor:
    return p.reshape(1) if p.dim() == 0 else p


def _basis_of_last_dimension(p: Tensor) -> Tensor:
    """(D, *p.shape): direction d is one at index d of every variable of the batch."""
    if p.dim() == 0:
        return torch.ones_like(p)[None]
    size = p.shape[-1]
    eye = torch.eye(size, dtype=p.dtype, device=p.device)
    return eye.reshape(size, *[1] * (p.dim() - 1), size).expand(size, *p.shape)


def _joint_basis(params: Sequence[Tensor]) -> list[Tensor]:
    """For each parameter (N, *shape): direction n is one at element n of all N together."""
    sizes = [p.numel() for p in params]
    eye = torch.eye(sum(sizes), dtype=params[0].dtype, device=params[0].device)
    parts = torch.split(eye, sizes, dim=1)
    return [part.reshape(-1, *p.shape) for part, p in zip(parts, params, strict=True)]
