"""What an inner optimizer is: a pair of pure functions and its hyperparameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from metarun.unroll._torch import pytree

Params = dict[str, Tensor]
"""Parameters by name, as `named_parameters()` gives them."""

HyperValue = float | Tensor | Mapping[str, float | Tensor]
"""One value for all parameters, or one value a parameter name."""

Hyper = Mapping[str, HyperValue]
"""Hyperparameters by name ("lr", "momentum" …). A tensor takes part in differentiation and
must broadcast against the parameters that it serves; a Python float is a constant."""

State = Any  # a pytree of tensors that only the optimizer itself looks into

ParamHyper = Mapping[str, float | Tensor]
"""The hyperparameters of one parameter, by name."""

S = TypeVar("S")


class InnerOptimizer(NamedTuple):
    """A differentiable optimizer, in the manner of optax's gradient transformations.

    Attributes:
        init: `init(params) -> state`.
        update: `update(grads, state, params, hyper) -> (params, state)`, out of place and
            differentiable with respect to every tensor that goes in.
        hyper: the default hyperparameters; their names are those that `update` reads.

    Example:
        An optimizer of one's own, by the signs of gradients:

        >>> import torch
        >>> from metarun.unroll import InnerOptimizer, unroll
        >>> def update(grads, state, params, hyper):
        ...     return {n: p - hyper["lr"] * grads[n].sign() for n, p in params.items()}, state
        >>> by_sign = InnerOptimizer(lambda params: (), update, {"lr": 0.5})
        >>> start = {"w": torch.tensor([2.0, -1.0])}
        >>> unroll(lambda p, step: p["w"].square().sum(), start, by_sign, 2).params["w"]
        tensor([1., 0.])
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Hyper], tuple[Params, State]]
    hyper: Mapping[str, HyperValue]


class Derivatives(Protocol):
    """The inner loss at the current parameters, and its derivatives on demand.

    A `LossOptimizer` gets one at each step.

    Attributes:
        loss: (), the value.
    """

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

        Args:
            names: the parameters, in the order in which they are flattened.

        Returns:
            (N, N), for the N elements of the flattened parameters one after the other.
        """
        ...


class LossOptimizer(NamedTuple):
    """An optimizer that needs more of the loss than its gradient, such as Newton's method.

    Attributes:
        init: `init(params) -> state`.
        update: `update(derivatives, state, params, hyper) -> (params, state)`, out of place and
            differentiable; `derivatives` is a `Derivatives`.
        hyper: as of `InnerOptimizer`.

    Example:
        The Polyak step size, loss / ‖gradient‖², for a loss whose minimum is zero:

        >>> import torch
        >>> from metarun.unroll import LossOptimizer, unroll
        >>> def update(derivatives, state, params, hyper):
        ...     grads = derivatives.gradient()
        ...     size = derivatives.loss / sum(g.square().sum() for g in grads.values())
        ...     return {n: p - size * grads[n] for n, p in params.items()}, state
        >>> polyak = LossOptimizer(lambda params: (), update, {})
        >>> start = {"w": torch.tensor([2.0, -1.0])}
        >>> unroll(lambda p, step: p["w"].square().sum(), start, polyak, 1).params["w"]
        tensor([ 1.0000, -0.5000])
    """

    init: Callable[[Params], State]
    update: Callable[[Derivatives, State, Params, Hyper], tuple[Params, State]]
    hyper: Mapping[str, HyperValue]


def hyper_for(hyper: Hyper, name: str, parameter: str) -> float | Tensor:
    """The value of hyperparameter `name` for one parameter.

    Args:
        hyper: all hyperparameters.
        name: which of them.
        parameter: the parameter's name, which counts where there is a value a parameter.

    Returns:
        The number or tensor.

    Raises:
        KeyError: there is no such hyperparameter, or no value of it for this parameter.

    Example:
        >>> from metarun.unroll.optim import hyper_for
        >>> hyper_for({"lr": {"weight": 0.1, "bias": 0.2}, "momentum": 0.9}, "lr", "bias")
        0.2
    """
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

    Args:
        x: any shape. Negative elements count as zero; NaN stays NaN.

    Returns:
        √max(x, 0), elementwise.

    Example:
        >>> import torch
        >>> from metarun.unroll.optim import safe_sqrt
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> torch.autograd.grad(safe_sqrt(x).sum(), x)
        (tensor([0.0000, 0.2500]),)
    """
    none = x <= 0
    return torch.where(none, 0.0, torch.where(none, 1.0, x).sqrt())


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm of all elements, (), whose derivatives at zero are zero instead of NaN.

    Args:
        x: any shape.

    Returns:
        √(Σ xᵢ²), ().

    Example:
        >>> import torch
        >>> from metarun.unroll.optim import safe_norm
        >>> x = torch.zeros(2, requires_grad=True)
        >>> torch.autograd.grad(safe_norm(x), x)
        (tensor([0., 0.]),)
    """
    nonzero = (x != 0).any()
    return torch.where(nonzero, torch.where(nonzero, x, 1.0).norm(), 0.0)


def per_parameter(
    init: Callable[[Tensor], S],
    rule: Callable[[Tensor, S, Tensor, ParamHyper], tuple[Tensor, S]],
    hyper: Mapping[str, HyperValue],
    real_only: str | None = None,
) -> InnerOptimizer:
    """An optimizer that treats each parameter by itself; its state is a dict by name.

    A complex parameter takes the steps of its real and imaginary parts, as in torch.

    Args:
        init: `init(param) -> state` of one parameter.
        rule: `rule(grad, state, param, hyper) -> (param, state)`, of real numbers.
        hyper: the default hyperparameters, those that a rule is given.
        real_only: the optimizer's name if it refuses complex parameters.

    Returns:
        The optimizer.

    Raises:
        ValueError: from `init` and `update`: a complex parameter under `real_only`, or a complex
            hyperparameter for a complex parameter.

    Example:
        Gradient descent that counts its steps:

        >>> import torch
        >>> from metarun.unroll import unroll
        >>> from metarun.unroll.optim import per_parameter
        >>> def rule(grad, count, param, hyper):
        ...     return param - hyper["lr"] * grad, count + 1
        >>> counting = per_parameter(lambda param: torch.zeros(()), rule, {"lr": 0.1})
        >>> end = unroll(lambda p, step: p["w"].sum(), {"w": torch.ones(2)}, counting, 3)
        >>> end.params["w"], end.state["w"]
        (tensor([0.7000, 0.7000]), tensor(3.))
    """

    def init_all(params: Params) -> dict[str, S]:
        if real_only is not None:
            refuse_complex(params, real_only)
        return {name: init(p) for name, p in params.items()}

    def update(
        grads: Params, state: Mapping[str, S], params: Params, given: Hyper
    ) -> tuple[Params, dict[str, S]]:
        moved, states = {}, {}
        for name, p in params.items():
            own = {key: hyper_for(given, key, name) for key in hyper}
            if p.is_complex():
                if real_only is not None:
                    refuse_complex(params, real_only)
                of_parts = _on_parts(rule, p)
                moved[name], states[name] = of_parts(grads[name], state[name], p, own)
            else:
                moved[name], states[name] = rule(grads[name], state[name], p, own)
        return moved, states

    return InnerOptimizer(init_all, update, dict(hyper))


def _on_parts(
    rule: Callable[[Tensor, S, Tensor, ParamHyper], tuple[Tensor, S]], p: Tensor
) -> Callable[[Tensor, S, Tensor, ParamHyper], tuple[Tensor, S]]:
    """The rule for a complex parameter: that of its real and imaginary parts, (…, 2).

    States keep the parameter's shape and type.
    """

    def as_parts(x: Any) -> Any:
        return parts(x) if isinstance(x, Tensor) else x

    def as_complex(x: Any) -> Any:
        of_parts = isinstance(x, Tensor) and x.shape == (*p.shape, 2)
        return torch.view_as_complex(x.contiguous()) if of_parts else x

    def on_parts(g: Tensor, state: S, p: Tensor, hyper: ParamHyper) -> tuple[Tensor, S]:
        for name, value in hyper.items():
            if isinstance(value, Tensor) and value.is_complex():
                raise ValueError(f"the hyperparameter {name} is complex: give a real number")
        real = {
            name: v[..., None] if isinstance(v, Tensor) and v.dim() else v
            for name, v in hyper.items()
        }
        moved, new = rule(parts(g), pytree.tree_map(as_parts, state), parts(p), real)
        return as_complex(moved), pytree.tree_map(as_complex, new)

    return on_parts


def parts(x: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor, (…, 2); a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def refuse_complex(params: Params, optimizer: str) -> None:
    """Refuse complex parameters, for an optimizer that has no rule for them.

    Raises:
        ValueError: it names the first.
    """
    for name, p in params.items():
        if p.is_complex():
            raise ValueError(
                f"{optimizer} does not take complex parameters, and {name} is {p.dtype}: keep its "
                "real and imaginary parts as real parameters (torch.view_as_real, "
                "torch.view_as_complex in the loss), or use sgd or adam"
            )


def signed(grad: Tensor, maximize: bool) -> Tensor:
    """The gradient of what is minimised."""
    return -grad if maximize else grad


def decayed_gradient(grad: Tensor, param: Tensor, decay: float | Tensor) -> Tensor:
    """The gradient with weight decay as an L2 penalty."""
    return grad if is_off(decay) else grad + decay * param


def decayed_param(param: Tensor, lr: float | Tensor, decay: float | Tensor) -> Tensor:
    """The parameter after decoupled weight decay (Loshchilov and Hutter 2019)."""
    return param if is_off(decay) else param * (1 - lr * decay)


def step_count(param: Tensor) -> Tensor:
    """A step counter starting at zero: float64 (), a tensor so that states are pytrees.

    Each parameter has its own, as in torch: a parameter may join later than the others.
    """
    return torch.zeros((), dtype=torch.float64, device=param.device)


def as_double(value: float | Tensor, like: Tensor) -> Tensor:
    """The value as a float64 tensor, still in its graph; a constant on the device of `like`."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.full((), value, dtype=torch.float64, device=like.device)


def power(base: float | Tensor, exponent: Tensor) -> Tensor:
    """base ** exponent in float64.

    Bias corrections are tensors so that learned betas get their derivative, and float64 so that
    float32 runs do not lose 1 - beta to rounding.
    """
    return torch.pow(base.double() if isinstance(base, Tensor) else base, exponent)
