"""What can be put in front of an inner optimizer: clipped and preconditioned gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    Hyper,
    HyperValue,
    InnerOptimizer,
    LossOptimizer,
    Params,
    State,
    hyper_for,
    parts,
    refuse_complex,
    safe_sqrt,
)
from metarun.unroll.optim.check import check_optimizer
from metarun.unroll.optim.preconditioners import Preconditioner


def clip_norm(optimizer: InnerOptimizer, max_norm: float | Tensor) -> InnerOptimizer:
    """The optimizer on gradients that are scaled down to a global norm of `max_norm`.

        g ← g · min(1, max_norm / (‖g‖ + 1e-6)),  ‖g‖ over all parameters together

    The formula of `torch.nn.utils.clip_grad_norm_`, over all parameters that the optimizer gets
    (those of its part, within a `partition`). The derivative is that of the scaled gradient, and
    is finite where all gradients are zero.

    Args:
        optimizer: what steps along the clipped gradients.
        max_norm: becomes a hyperparameter of that name; where it has a value a parameter, each is
            compared with the one global norm.

    Returns:
        An `InnerOptimizer` with the same state.

    Raises:
        ValueError: a constant `max_norm` that is not above 0; the optimizer has one already, or
            is no `InnerOptimizer`.

    Example:
        >>> import torch
        >>> from metarun.unroll import clip_norm, sgd, unroll
        >>> inner = clip_norm(sgd(lr=1.0), max_norm=1.0)
        >>> start = {"w": torch.tensor([3.0, 4.0])}
        >>> unroll(lambda p, step: p["w"].square().sum(), start, inner, 1).params["w"]
        tensor([2.4000, 3.2000])

    References:
        Pascanu, Mikolov and Bengio 2013, On the difficulty of training recurrent neural networks.
    """
    _check_positive("max_norm", max_norm)

    def clipped(grads: Params, hyper: Hyper) -> Params:
        squares = [parts(g).square().sum() for g in grads.values()]
        norm = safe_sqrt(torch.stack(squares).sum()) if squares else torch.zeros(())
        return {
            name: g
            * (hyper_for(hyper, "max_norm", name) / (norm + 1e-6)).clamp(max=1).to(parts(g).dtype)
            for name, g in grads.items()
        }

    return _on_gradients(optimizer, clipped, {"max_norm": max_norm})


def clip_value(optimizer: InnerOptimizer, limit: float | Tensor) -> InnerOptimizer:
    """The optimizer on gradients that are clipped elementwise to [-limit, limit].

    As `torch.nn.utils.clip_grad_value_`.

    Args:
        optimizer: what steps along the clipped gradients.
        limit: becomes the hyperparameter `clip_value`; a tensor must broadcast against each
            parameter.

    Returns:
        An `InnerOptimizer` with the same state.

    Raises:
        ValueError: a constant limit that is not above 0; the optimizer has one already, or is
            no `InnerOptimizer`. From `update`: a complex gradient.

    Example:
        >>> import torch
        >>> from metarun.unroll import clip_value, sgd, unroll
        >>> inner = clip_value(sgd(lr=1.0), limit=0.5)
        >>> start = {"w": torch.tensor([3.0, 0.1])}
        >>> unroll(lambda p, step: p["w"].square().sum(), start, inner, 1).params["w"]
        tensor([ 2.5000, -0.1000])
    """
    _check_positive("clip_value", limit)

    def clipped(grads: Params, hyper: Hyper) -> Params:
        refuse_complex(grads, "clip_value")
        limits = {name: hyper_for(hyper, "clip_value", name) for name in grads}
        return {
            name: g.clamp(max=limits[name]).clamp(min=-limits[name]) for name, g in grads.items()
        }

    return _on_gradients(optimizer, clipped, {"clip_value": limit})


def precondition(
    optimizer: InnerOptimizer | LossOptimizer, preconditioner: Preconditioner, params: Params
) -> InnerOptimizer:
    """The optimizer on gradients multiplied by factors, which are there to be learned.

    The factors become hyperparameters, each with a tensor a parameter; they start as identities,
    with which the optimizer takes the steps that it takes without. To learn them, put tensors
    that require gradients in their place.

    Args:
        optimizer: what steps along the preconditioned gradients.
        preconditioner: `META_CURVATURE`, `KRONECKER`, `KRONECKER_PSD`, or one of your own.
        params: the parameters that get factors; others keep their gradients.

    Returns:
        An `InnerOptimizer` with the same state.

    Raises:
        ValueError: the optimizer has such factors already, or is no `InnerOptimizer`; a complex
            parameter. From `update`: factors that are not by parameter name.

    Example:
        >>> import torch
        >>> from metarun.unroll import META_CURVATURE, precondition, sgd, unroll
        >>> params = {"w": torch.ones(2)}
        >>> optimizer = precondition(sgd(0.1), META_CURVATURE, params)
        >>> factors = META_CURVATURE.factors(params)  # name -> parameter -> tensor
        >>> diagonal = factors["curvature_out"]["w"].requires_grad_()
        >>> hyper = {**optimizer.hyper, **factors}
        >>> end = unroll(lambda p, s: p["w"].square().sum(), params, optimizer, 1, hyper=hyper)
        >>> torch.autograd.grad(end.params["w"].sum(), diagonal)  # −lr · 2w
        (tensor([-0.2000, -0.2000]),)

    References:
        Park and Oliva 2019, Meta-Curvature.
        Arnold, Iqbal and Sha 2021, When MAML can adapt fast and how to assist when it cannot.
    """
    refuse_complex(params, "precondition")
    factors = preconditioner.factors(params)

    def transformed(grads: Params, hyper: Hyper) -> Params:
        result = {}
        for name, g in grads.items():
            own = {
                key: of[name] for key in factors if name in (of := _values_by_parameter(hyper, key))
            }
            result[name] = preconditioner.apply(g, own) if own else g
        return result

    return _on_gradients(optimizer, transformed, factors)


def _values_by_parameter(hyper: Hyper, key: str) -> Mapping[str, Tensor]:
    value = hyper[key]
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} needs a tensor for each parameter, by name")
    return {name: torch.as_tensor(factor) for name, factor in value.items()}


def _on_gradients(
    optimizer: InnerOptimizer | LossOptimizer,
    transform: Callable[[Params, Hyper], Params],
    extra: Mapping[str, HyperValue],
) -> InnerOptimizer:
    if isinstance(optimizer, LossOptimizer):
        raise ValueError(
            f"{', '.join(extra) or 'a preconditioner'}: an optimizer that takes more of the loss "
            "than its gradient (newton, mixed) cannot be given changed gradients; wrap the "
            "gradient-driven parts instead, as in mixed([(…, clip_norm(sgd(…), …)), (…, newton())])"
        )
    check_optimizer(optimizer)
    taken = sorted(set(extra) & set(optimizer.hyper))
    if taken:
        raise ValueError(f"the optimizer has {', '.join(taken)} already")

    def update(grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        return optimizer.update(transform(grads, hyper), state, params, hyper)

    return InnerOptimizer(optimizer.init, update, {**optimizer.hyper, **extra})


def _check_positive(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")
