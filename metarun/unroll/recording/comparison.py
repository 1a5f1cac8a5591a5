"""Comparing a recording with the function that it stands for, bit by bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metarun.unroll._torch import TorchDispatchMode, pytree

NOISE = 100.0
"""A GPU's kernels that add in any order do not repeat their bits. There a difference counts if it
is more than this many times as large as that of a recording with itself."""


class Rewritten(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations put in another way, as in a recording that was made with them so."""

    def __init__(self, instead: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.instead = instead

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.instead:
            with self:
                outcome = self.instead[func](*args, **(kwargs or {}))
            if outcome is not NotImplemented:
                return outcome
        return func(*args, **(kwargs or {}))


@contextmanager
def undone(constants: Sequence[Tensor], unseen: bool = False) -> Iterator[None]:
    """Give tensors that a block changes in place their values back after it.

    Args:
        unseen: whether torch may not know that they were changed, as by the graph of a device.
    """
    before = [(tensor, tensor._version, tensor.detach().clone()) for tensor in constants]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, value in before:
                if tensor._version != version or (unseen and not torch.equal(tensor, value)):
                    tensor.copy_(value)


def agree(expected: Any, found: Any, repeat: Callable[[], Any]) -> bool:
    """Whether a recording gives what the function gives.

    Args:
        expected: what the function gives, a pytree of tensors.
        found: what the recording gives.
        repeat: runs the recording once more.
    """
    ours, structure = pytree.tree_flatten(found)
    theirs, other = pytree.tree_flatten(expected)
    if structure != other or any(_form(a) != _form(b) for a, b in zip(ours, theirs, strict=True)):
        return False
    if all(map(_same_bits, ours, theirs)):
        return True
    again = pytree.tree_leaves(repeat())
    if all(map(_same_bits, ours, again)):
        return False
    return _distance(ours, theirs) <= NOISE * _distance(ours, again)


def _form(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is like NaN


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of a tensor, in relation to the tensor's size."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-300)) for a, b in pairs)
