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
    """The inner loop depends on a tensor that it was not given."""


class _Watch(TorchFunctionMode):
    """Refuses tensors from outside that need gradients or belong to a surrounding transform.

    What the watched function is given is plain, and gradients are disabled around it. So a
    tensor that requires them where they are disabled, or that a transform outside has wrapped,
    comes from outside, unless an operation inside has returned it. Transforms of the function's
    own have deeper levels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = _functorch.maybe_current_level() or 0
        self.made: dict[int, Tensor] = {}  # alive, so that no other tensor takes its identity
        self.called: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.called.append(func)
        made = tensor_leaves(outputs)
        if made:  # not where only a shape, say, was asked for
            for leaf in tensor_leaves((args, kwargs or {})):
                if id(leaf) not in self.made:
                    self._check(leaf, detaches=func is Tensor.detach)
        self.made |= {id(leaf): leaf for leaf in made}
        return outputs

    def _check(self, x: Tensor, detaches: bool) -> None:
        wrapped = _functorch.is_functorch_wrapped_tensor(x)
        if wrapped and not 1 <= _functorch.maybe_get_level(x) <= self.depth:
            return  # of a transform inside, under way or just over
        if wrapped or (x.requires_grad and not torch.is_grad_enabled() and not detaches):
            raise ClosureError(
                f"the inner loop uses a tensor of shape {_shape(x)} that requires gradients or "
                "is mapped over tasks, but is neither in params nor in context, so this gradient "
                "mode would lose its gradient: give it as unroll(…, context=…) in a pytree of "
                "dicts, lists and tuples, or detach it if it is a constant"
            )


def check_closure(fn: Callable[[Any], Any], inputs: Any) -> list[Any]:
    """Evaluate `fn(inputs)` once, without a graph and on plain tensors.

    Returns:
        The functions of torch that it called, in their order.

    Raises:
        ClosureError: it uses a tensor from outside that requires gradients or that belongs to
            a surrounding `torch.func.vmap` or `grad`.
    """
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        plain = plain_values(inputs)
        random_state = RandomState(tensor_leaves(plain))
    with torch.no_grad(), random_state.restored(), _Watch() as watch:
        fn(plain)
    called: list[Any] = watch.called
    return called


def plain_values(tree: Any) -> Any:
    """A pytree with copies of its tensors' values; to be called outside of all transforms."""
    return pytree.tree_map(lambda x: _plain(x) if isinstance(x, Tensor) else x, tree)


def _plain(x: Tensor) -> Tensor:
    """The values of a tensor below all transforms: of the first task, where tasks are mapped."""
    while _functorch.is_functorch_wrapped_tensor(x):
        task_dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else None
        x = _functorch.get_unwrapped(x)
        if task_dim is not None:
            x = x.select(task_dim, 0)
    return x.detach().clone()  # so that a loss which writes on its arguments writes on this


def _shape(x: Tensor) -> tuple[int, ...]:
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return tuple(x.shape)
