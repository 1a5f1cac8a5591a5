"""What an inner optimizer is: a pair of pure functions and its hyperparameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by name, as `named_parameters()` gives them."""

HyperValue = float | Tensor | Mapping[str, float | Tensor]
"""One value for all parameters, or one value a parameter name."""

Hyper = Mapping[str, HyperValue]
"""Hyperparameters by name ("lr", "momentum" …). A tensor takes part in differentiation and
must broadcast against the parameters that it serves; a Python float is a constant."""

State = Any  # a pytree of tensors that only the optimizer itself looks into


class InnerOptimizer(NamedTuple):
    """A differentiable optimizer, in the manner of optax's gradient transformations.

    Attributes:
        init: `init(params) -> state`.
        update: `update(grads, state, params, hyper) -> (params, state)`, out of place and
            differentiable with respect to every tensor that goes in.
        hyper: the default hyperparameters; their names are those that `update` reads.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Hyper], tuple[Params, State]]
    hyper: Mapping[str, HyperValue]


class Derivatives(Protocol):
    """The inner loss at the current parameters, and its derivatives on demand."""

    loss: Tensor

    def gradient(self) -> Params:
        """The gradient, by parameter name."""
        ...

    def hessian(self, name: str) -> Tensor:
        """The second derivative of a parameter that is a batch of independent variables.

        Args:
            name: the parameter, of shape (..., D).

        Returns:
            (..., D, D). Where the variables are *not* independent, a block is the sum of all
            blocks in its row of the whole Hessian; see `metarun.unroll.optim.newton`.
        """
        ...

    def joint_hessian(self, names: Sequence[str]) -> Tensor:
        """The second derivative of several parameters together, with all cross terms.

        Returns:
            (N, N), for the N elements of the flattened parameters one after the other.
        """
        ...


class LossOptimizer(NamedTuple):
    """An optimizer that needs more of the loss than its gradient, such as Newton's method.

    Attributes:
        init: `init(params) -> state`.
        update: `update(derivatives, state, params, hyper) -> (params, state)`, out of place and
            differentiable.
        hyper: as of `InnerOptimizer`.
    """

    init: Callable[[Params], State]
    update: Callable[[Derivatives, State, Params, Hyper], tuple[Params, State]]
    hyper: Mapping[str, HyperValue]


def hyper_for(hyper: Hyper, name: str, parameter: str) -> float | Tensor:
    """The value of hyperparameter `name` for one parameter."""
    value = hyper[name]
    return value[parameter] if isinstance(value, Mapping) else value


def is_off(value: float | Tensor) -> bool:
    """Whether a feature is switched off: a constant zero. A tensor is never off."""
    return not isinstance(value, Tensor) and value == 0


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero instead of infinite.

    Second moments are exactly zero where a gradient has been zero throughout (a dead ReLU, a
    bias before batch normalisation); there the infinite derivative of the root would meet a
    zero and turn the whole meta-gradient into NaN. The inner `where` keeps the root off zero,
    the outer one puts the right value back; both are needed.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def zeros_like(params: Params) -> Params:
    """A zero for every parameter."""
    return {name: torch.zeros_like(p) for name, p in params.items()}


def step_count(params: Params) -> Tensor:
    """A step counter starting at zero: float64 (), a tensor so that states are pytrees."""
    device = next(iter(params.values())).device if params else None
    return torch.zeros((), dtype=torch.float64, device=device)
