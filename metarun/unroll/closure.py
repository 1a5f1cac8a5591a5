"""Finding tensors that a recomputed function closes over, whose gradients would be lost."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metarun.unroll.recompute import RandomState, tensor_leaves


class ClosureError(ValueError):
    """The inner loss depends on a tensor that it was not given."""


class _Watch(TorchFunctionMode):
    # Nothing that the function was given, or that it makes itself, requires a gradient or is
    # wrapped by a transform while it is evaluated as below: such a tensor comes from outside.
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and not torch.is_grad_enabled():
                mapped = _functorch.is_functorch_wrapped_tensor(leaf)
                if (mapped and _functorch.maybe_current_level() is None) or leaf.requires_grad:
                    raise ClosureError(
                        f"the inner loss uses a tensor of shape {_shape(leaf)} that requires "
                        "gradients or is mapped over tasks, but is neither in params nor in "
                        "context, so this gradient mode would lose its gradient: give it as "
                        "unroll(…, context=…), or detach it if it is a constant"
                    )
        return func(*args, **kwargs)


def check_closure(fn: Callable[[Any], Any], inputs: Any) -> None:
    """Evaluate `fn(inputs)` once, without a graph and on plain tensors.

    Raises:
        ClosureError: it uses a tensor from outside that requires gradients or that belongs to
            a surrounding `torch.func.vmap` or `grad`.
    """
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        plain = pytree.tree_map(lambda x: _plain(x) if isinstance(x, Tensor) else x, inputs)
        with RandomState(tensor_leaves(plain)).restored(), _Watch():
            fn(plain)


def _plain(x: Tensor) -> Tensor:
    """The values of a tensor below all transforms: of the first task, where tasks are mapped."""
    while _functorch.is_functorch_wrapped_tensor(x):
        task_dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else None
        x = _functorch.get_unwrapped(x)
        if task_dim is not None:
            x = x.select(task_dim, 0)
    return x.detach()


def _shape(x: Tensor) -> tuple[int, ...]:
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return tuple(x.shape)
