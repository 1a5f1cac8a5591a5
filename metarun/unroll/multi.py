"""Stateful optimizers that are given a loss, in the protocol of Pyro's `MultiOptimizer`.

    optimizer = Mixed([(["weights"], FirstOrder(adam(0.01))), (["latent"], Newton())])
    optimizer.step(loss, params)              # in place, detached
    params = optimizer.get_step(loss, params)  # new tensors, differentiable

`params` is a dict of the tensors that `loss` was computed from.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.unroll._torch import pytree
from metarun.unroll.gradients.derivatives import derivatives_of_value
from metarun.unroll.optim.base import (
    HyperValue,
    InnerOptimizer,
    LossOptimizer,
    Params,
    refuse_complex,
)
from metarun.unroll.optim.mixed import mixed
from metarun.unroll.optim.newton import newton, newton_direction, semi_axes


class MultiOptimizer:
    """What `FirstOrder`, `Newton` and `Mixed` have in common: an optimizer and its state.

    Args:
        optimizer: the functional optimizer. Its state begins with the first step, and belongs
            to the parameters of that step.
    """

    def __init__(self, optimizer: InnerOptimizer | LossOptimizer) -> None:
        self.optimizer = optimizer
        self._names: list[str] = []
        self._state: Any = None

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> Params:
        """The parameters after one step, as a function of all that `loss` and `params` are.

        The optimizer's state advances too, and keeps its graph: a chain of these is an unroll
        of the optimizer. `step` ends the chain.

        Args:
            loss: a scalar, differentiable as often as the optimizer needs and once more.
            params: the tensors to move, by name; they must require gradients.

        Raises:
            ValueError: a loss that is not a scalar or does not depend on one of `params`, other
                parameters than before, a loss whose derivatives torch would get wrong (compute
                it within `RightDerivatives()` of this package then), or whatever the optimizer
                refuses.
        """
        params = dict(params)
        derivatives = derivatives_of_value(loss, params)
        if self._state is None:
            self._state, self._names = self.optimizer.init(params), sorted(params)
        if sorted(params) != self._names:
            raise ValueError(
                f"this optimizer has the state of {', '.join(self._names)}, and was given "
                f"{', '.join(sorted(params))}"
            )
        if isinstance(self.optimizer, LossOptimizer):
            moved, self._state = self.optimizer.update(
                derivatives, self._state, params, self.optimizer.hyper
            )
        else:
            moved, self._state = self.optimizer.update(
                derivatives.gradient(), self._state, params, self.optimizer.hyper
            )
        return moved

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Move the parameters in place. Neither they nor the state keep a graph.

        Raises:
            ValueError: as `get_step`.
        """
        moved = self.get_step(loss, params)
        self._state = pytree.tree_map(torch.Tensor.detach, self._state)
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(moved[name])


class FirstOrder(MultiOptimizer):
    """Any gradient-based optimizer of `metarun.unroll`: `FirstOrder(adam(lr=0.01))`."""


class Newton(MultiOptimizer):
    """Newton's method on batches of independent low-dimensional variables.

    Args:
        trust_radii: the longest step by parameter name; names without one have no bound.
        joint, damping: as in `metarun.unroll.newton`.
    """

    def __init__(
        self,
        trust_radii: Mapping[str, float | Tensor] | None = None,
        *,
        joint: bool = False,
        damping: HyperValue = 0.0,
    ) -> None:
        super().__init__(newton(trust_radii or None, joint, damping))


class Mixed(MultiOptimizer):
    """Different optimizers for different parameters.

    Args:
        parts: (names or shell-style patterns, optimizer), the latter one of this module or a
            functional one. The state is that of this object, not that of its parts'.

    Raises:
        ValueError: a part that claims nothing, or a name that two parts list. From the steps: a
            parameter that two parts claim or none.
    """

    def __init__(
        self,
        parts: Sequence[
            tuple[str | Sequence[str], "MultiOptimizer | InnerOptimizer | LossOptimizer"]
        ],
    ) -> None:
        functional = [
            (names, o.optimizer if isinstance(o, MultiOptimizer) else o) for names, o in parts
        ]
        super().__init__(mixed(functional))


def newton_step(
    loss: Tensor, x: Tensor, trust_radius: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One Newton step for a batch of independent variables, and the covariance at its start.

    If `loss` is a negative log density, normal distributions with this mean and covariance are
    a Laplace approximation once the steps have converged.

    Args:
        loss: a scalar, computed from `x`.
        x: (..., D).
        trust_radius: as in `metarun.unroll.newton`.

    Returns:
        The mode, (..., D), and the inverse of the safeguarded Hessian, (..., D, D), both
        differentiable. The covariance is NaN where a variable has no usable derivatives.

    Raises:
        ValueError: the loss is not a scalar or does not depend on x, x has no dimension, or a
            radius is not above 0.
    """
    if x.dim() == 0:
        raise ValueError("x must have one dimension or more: its last is that of a variable")
    refuse_complex({"x": x}, "newton_step")
    derivatives = derivatives_of_value(loss, {"x": x})
    axes = semi_axes(math.inf if trust_radius is None else trust_radius, x)
    step, matrix = newton_direction(derivatives.gradient()["x"], derivatives.hessian("x"), axes)
    return x + step, torch.linalg.inv_ex(matrix).inverse
