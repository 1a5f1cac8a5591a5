"""The tensors of the original model, recognised while a patched copy of it runs.

The copy computes with fast weights. Whatever still holds the original's modules or parameters
(a global variable, say) would compute with weights that are never adapted, without a word. So
these tensors have another class while the copy runs, one with `__torch_function__`. An operation
that gets one of them comes by there, and all other operations cost nothing.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.unroll._torch import DisableTorchFunctionSubclass
from metarun.unroll.gradients.recompute import tensor_leaves

Current = Callable[[str], Tensor | None]
"""What the patched copy has in place of the original's tensor of this name."""


class Watched(NamedTuple):
    """The tensors of the original of one patched module.

    Attributes:
        tensors: those that are recognised.
        names: id -> name.
        current: gives the copy's tensor of such a name.
    """

    tensors: Sequence[Tensor]
    names: Mapping[int, str]
    current: Current


here = threading.local()
"""Its `runs` are what is watched in this thread, for one patched module inside another."""

_marked: list[Tensor] = []

_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Attributes of a tensor that are tensors."""

_NO_VALUES = {
    *("__hash__", "__len__", "__repr__", "data_ptr", "dim", "element_size", "get_device"),
    *("is_complex", "is_contiguous", "is_floating_point", "ndimension", "nelement", "numel"),
    *("size", "storage_offset", "stride", "untyped_storage"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
    *("new_empty", "new_full", "new_ones", "new_zeros"),
}
"""Functions whose results do not depend on a tensor's values."""


class _Recognised:
    """Mixed into the class of an original tensor meanwhile."""

    __slots__ = ()
    plain: type

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        watched = runs()  # nothing in a thread that uses the original itself
        with DisableTorchFunctionSubclass():
            if not watched or _is_free_of_values(func):
                return func(*args, **(kwargs or {}))
            return _checked(watched, func, args, kwargs or {})


def mark(tensors: Iterable[Tensor]) -> None:
    """Recognise these tensors from now on. Calls must not overlap with others, nor `unmark`'s."""
    for x in tensors:
        kind: Any = type(x)
        if kind is nn.Parameter or not issubclass(kind, _Recognised):
            x.__class__ = _recognised(kind)
            _marked.append(x)


def unmark() -> None:
    """Give all tensors back their class."""
    for x in _marked:
        kind: Any = type(x)
        x.__class__ = kind.plain
    _marked.clear()


def runs() -> tuple[Watched, ...]:
    """What is watched in this thread: nothing, unless a patched module runs in it."""
    return getattr(here, "runs", ())


@functools.cache
def _recognised(kind: type) -> type:
    namespace = {"__slots__": (), "__module__": kind.__module__, "plain": kind}
    return type(kind)(kind.__name__, (_Recognised, kind), namespace)


def _is_free_of_values(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _VALUES
    return name in _NO_VALUES


def _checked(
    watched: tuple[Watched, ...],
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`func` of the original's constants; what the copy adapts or has changed is refused.

    A frozen parameter, or a buffer, may be read as long as the copy's is the same. It must not
    be written: the original stays as it is.
    """
    used = [
        (x, names[id(x)], current)
        for x in tensor_leaves((args, kwargs))
        for _, names, current in watched
        if id(x) in names
    ]
    before = []
    for x, name, current in used:
        twin = current(name)
        if twin is not x and (twin is None or x.requires_grad or not _same(x, twin)):
            raise _stale(name)
        before.append(x.detach().clone())
    result = func(*args, **kwargs)
    for (x, name, current), value in zip(used, before, strict=True):
        if current(name) is not x and not _same(x, value):
            with torch.no_grad():
                x.copy_(value)
            raise _stale(name)
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    if b.requires_grad or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _stale(name: str) -> RuntimeError:
    owner = name.rpartition(".")[0]
    return RuntimeError(
        f"{name!r} of the original model was used while its patched copy ran: the copy's own, "
        "which is adapted, belongs there. Something outside of the modules leads to the original: "
        "a global variable, an object that is no nn.Module, a function that closes over the "
        "tensor itself, or a view, .data or a state_dict() that was taken of it before. Reach it "
        f"through the patched module instead (self.{owner or name}), or register what holds it as "
        "a submodule. If it is meant as a constant, give a copy: .detach().clone()"
    )
