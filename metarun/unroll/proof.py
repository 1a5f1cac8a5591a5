"""Finding out at the first step whether an unroll can be differentiated, not at its end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from metarun.unroll.advice import explained
from metarun.unroll.closure import layout_of, met_with
from metarun.unroll.recompute import tensor_leaves


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
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return  # under recording: whoever records takes the derivative
    met, layout = met_with(loss), ("differentiable", *layout_of(params))
    if layout in met:
        return
    if try_derivative(tensor_leaves(step), tensor_leaves(inputs)):
        met.add(layout)


_tried: set[Any] = set()
_LAST_OPERATIONS = 12


def try_once(loss: Tensor, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Differentiate a step on a loss once, when it is first seen with such inputs.

    Losses are told apart by their last operations.

    Raises:
        UnsuitableModel: an operation cannot be differentiated so often.
    """
    names: list[str] = []
    node = loss.grad_fn
    while node is not None and len(names) < _LAST_OPERATIONS:
        names.append(node.name())
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    key = (*names, *(x.shape for x in inputs))
    if key not in _tried and try_derivative(outputs, inputs):
        _tried.add(key)


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
    return x.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(x)
