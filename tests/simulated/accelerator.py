"""An accelerator that is not there: tensors of a device "npu", which a CPU computes.

Its tensors hold CPU tensors and say that they are elsewhere. So all arithmetic is real, and what a
real device would make of an operation can be told from its arguments:

- A tensor of the CPU with dimensions beside one of the device is an error, as it is there.
- An operation whose result the host must know before it goes on makes the host wait for the
  device: `.item()`, `bool(x)`, `.cpu()`, a shape that depends on values, a copy to the device
  that is not `non_blocking`. Each is counted, with the place in metarun that asked for it.

`register` changes torch for the rest of the process, so only processes of their own call it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import metarun

NAME = "npu"
PACKAGE = str(Path(metarun.__file__).parent)

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default, aten.copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
CHECKED = {  # look whether a factorisation has failed, the latter two within their kernels
    aten._linalg_check_errors.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
}


class Event(NamedTuple):
    """Something that a real device would not let pass.

    Attributes:
        what: "wait" or "mismatch".
        operation: which one.
        place: the file and the function of metarun that asked for it.
    """

    what: str
    operation: str
    place: str


class Mismatch(RuntimeError):
    """Tensors of two devices in one operation."""


_events: list[Event] | None = None


@contextmanager
def watched() -> Iterator[list[Event]]:
    """Gives the list of what happens within the block."""
    global _events
    before, _events = _events, []
    try:
        yield _events
    finally:
        _events = before


class Operation(NamedTuple):
    """What was computed: the arguments and the result are those of the CPU that are held."""

    func: Any
    args: Any
    kwargs: dict[str, Any]
    result: Any


_captured: list[Operation] | None = None


@contextmanager
def capturing() -> Iterator[list[Operation]]:
    """Gives the list of all operations within the block, in which nothing may wait."""
    global _captured
    _captured = []
    try:
        yield _captured
    finally:
        _captured = None


def _happened(what: str, func: Any) -> None:
    if what == "wait" and _captured is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
    if _events is not None:
        _events.append(Event(what, str(func), _place()))


def _place() -> str:
    """The innermost function of metarun on the stack that has a name."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and not frame.f_code.co_name.startswith("<"):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


class OnDevice(Tensor):
    """A tensor of the device.

    Attributes:
        held: its values, on the CPU.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        """As torch gives it for tensors of a device: copied to the CPU first."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _called(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _computed(func, args, kwargs)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives that has tensors of the device, or makes some."""
    tensors: list[Tensor] = []
    own_args, own_kwargs = _plain(args, tensors), _plain(kwargs, tensors)
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice)]
    to = kwargs.get("device")
    leaves_it = bool(there) and to is not None and torch.device(to).type != NAME
    if func in COPIES:
        # To the CPU, or from it, unless it need not be done at once (out of pinned memory).
        at_once = not kwargs.get("non_blocking", func is aten.copy_.default and args[2:] == (True,))
        if leaves_it or (here and at_once):
            _happened("wait", func)
    elif func in INDEXED and here:
        _happened("wait", func)  # the numbers are copied first
    elif any(x.dim() for x in here):
        _happened("mismatch", func)
        raise Mismatch(f"{func}: tensors of {NAME} and of the CPU")
    if waits(func, args, kwargs):
        _happened("wait", func)
    if func is aten._efficientzerotensor.default:  # the key that would fill it is above ours
        func = aten.zeros.default
    found = func(*own_args, **own_kwargs)
    if _captured is not None:
        _captured.append(Operation(func, own_args, own_kwargs, found))
    if leaves_it or (not there and not _is_on(to)):
        return found
    if func is aten.copy_.default and not isinstance(args[0], OnDevice):
        return args[0]
    one = isinstance(found, Tensor)
    wrapped = OnDevice(found) if one else tree_map_only(Tensor, OnDevice, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _plain(x: Any, tensors: list[Tensor]) -> Any:
    """An argument with values in place of tensors of the device; tensors are put into the list.

    torch's pytrees would take most of the time that the catalogue takes.
    """
    if isinstance(x, Tensor):
        tensors.append(x)
        return x.held if isinstance(x, OnDevice) else x
    if isinstance(x, tuple | list):
        return type(x)([_plain(item, tensors) for item in x])
    if isinstance(x, dict):
        return {name: _plain(item, tensors) for name, item in x.items()}
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return x


def _is_on(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host must know what an operation of the device gives."""
    if func in CHECKED or torch.Tag.data_dependent_output in func.tags:
        return True
    if func in INDEXED:  # by a mask: how many elements it has decides the shape
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return torch.Tag.dynamic_output_shape in func.tags


class _Module(_DummyBackendModule):
    """`torch.npu`: what torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_library: list[Any] = []


def register() -> torch.device:
    """Make the device known to torch, for the rest of the process."""
    if not _library:
        # A tracer that meets a tensor of a class it does not know records what is done within it.
        proxy_tensor.HANDLED_TYPES = (*proxy_tensor.HANDLED_TYPES, OnDevice)
        _setup_privateuseone_for_python_backend(NAME, _Module())
        every, one = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        every.fallback(_called, "PrivateUse1")
        every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        # What torch.tensor(…, device=…) calls below the dispatch to Python, where torch 2.14 finds
        # no fallback that is written in Python.
        for func in (aten.copy_.default, aten.empty_strided.default, aten.empty.memory_format):
            one.impl(func, partial(_called, func), "PrivateUse1")
        _library.extend([every, one])
    return torch.device(NAME, 0)
