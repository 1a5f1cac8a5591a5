"""Finding out at the first step whether an unroll can be differentiated, not at its end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.unroll._torch import get_current_dispatch_mode, is_functorch_wrapped_tensor
from metarun.unroll.advice import UnsuitableModel, explained
from metarun.unroll.gradients.closure import layout_of, met_with
from metarun.unroll.gradients.recompute import tensor_leaves


def versions_of(params: dict[str, Tensor]) -> list[int]:
    """How often each parameter has been written on; nothing where that cannot be known."""
    if torch.compiler.is_compiling() or any(p.is_inference() for p in params.values()):
        return []
    return [p._version for p in params.values()]


def check_unwritten(params: dict[str, Tensor], versions: list[int]) -> None:
    """Refuse a loss that has written on the parameters since `versions_of`.

    Raises:
        UnsuitableModel: it names the first such parameter.
    """
    for (name, p), version in zip(params.items(), versions, strict=False):
        if p._version != version:
            raise UnsuitableModel(
                f"the inner loss writes on the parameter {name} that it is given, and so changes "
                "where the unroll starts (an embedding with max_norm does: build it without, and "
                "normalise what it gives): let it work on a clone"
            )


def check_differentiable(step: Any, inputs: Any, loss: Any, params: dict[str, Tensor]) -> None:
    """Differentiate the first step of a loss once, when it is first seen with such parameters.

    Otherwise an operation without second derivative would be found in the caller's own
    `backward()` only, in torch's words.

    Args:
        step: a pytree of what the step gave.
        inputs: a pytree of what it was computed from.
        loss: the user's function.
        params: the parameters, which are among the inputs.

    Raises:
        UnsuitableModel: an operation cannot be differentiated so often.
    """
    if torch.compiler.is_compiling() or get_current_dispatch_mode() is not None:
        return  # under recording: whoever records takes the derivative
    outputs, inputs = tensor_leaves(step), tensor_leaves(inputs)
    met, layout = met_with(loss), (_last_operations(outputs), *layout_of(params))
    if layout not in met and try_derivative(outputs, inputs):
        met.add(layout)


_tried: set[Any] = set()
_FEW = 16


def try_once(
    loss: Tensor, outputs: Sequence[Tensor], inputs: Sequence[Tensor], kinds: tuple[type, ...]
) -> None:
    """Differentiate a step once, when the first of its kind is taken.

    Args:
        loss: what the step was taken on; its last operations tell kinds of steps apart.
        kinds: the classes of the modules that computed it, which do so as well.

    Raises:
        UnsuitableModel: an operation cannot be differentiated so often.
    """
    key = (kinds, _last_operations([loss]), *(x.shape for x in inputs))
    if key not in _tried and try_derivative(outputs, inputs):
        _tried.add(key)


def _last_operations(outputs: Sequence[Tensor]) -> tuple[str, ...]:
    """The names of some operations that gave the first output, to tell losses apart."""
    nodes: list[Any] = [x.grad_fn for x in outputs[:1] if _in_graph(x) and x.grad_fn is not None]
    for node in nodes:
        if len(nodes) > _FEW:
            break
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return tuple(node.name() for node in nodes)


def try_derivative(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Differentiate outputs by inputs in vain; says whether there was a derivative to take.

    Raises:
        UnsuitableModel: torch cannot, for a reason that is known.
    """
    ends = [x for x in outputs if _in_graph(x) and x.grad_fn is not None]
    starts = [x for x in inputs if _in_graph(x)]
    if not ends or not starts:
        return False
    with explained():
        ones = [torch.ones_like(x) for x in ends]
        torch.autograd.grad(ends, starts, ones, retain_graph=True, allow_unused=True)
    return True


def _in_graph(x: Tensor) -> bool:
    return x.requires_grad and not is_functorch_wrapped_tensor(x)
