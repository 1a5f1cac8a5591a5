"""Operations launched together, as one graph of the device (CUDA graphs).

A replay calls each operation from Python. On a GPU that takes longer than a small operation itself.
Here all are captured once, at fixed places in memory, and a call launches them together. Inputs are
copied to where the operations read them, and results from where they were written: so what a call
gives stays as it is when there is another one.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx

from metarun.unroll._torch import foreach_copy
from metarun.unroll.recording.comparison import agree, undone
from metarun.unroll.recording.cuda_capture import captured_by_cuda

Operations = Callable[..., Sequence[Tensor]]
"""Operations on tensors, which take no derivative and have no Python in between."""

Launching = Callable[[Operations, Sequence[Tensor], fx.GraphModule], Operations]
"""What makes other operations of some; `launched_together` is one."""

Capture = Callable[[torch.device, Callable[[], Sequence[Tensor]]], tuple[Sequence[Tensor], Any]]
"""`capture(device, run) -> (results, launch)`.

The results are where each `launch()` writes them. `run` is called several times.
"""

_one_at_a_time = RLock()  # graphs share the memory of their intermediate results


class CaptureError(RuntimeError):
    """Operations cannot be launched as one graph; says why.

    Example:
        >>> import torch
        >>> from metarun.unroll import CaptureError, launched_together
        >>> try:
        ...     launched_together(lambda x: [x + 1], [torch.ones(1)])
        ... except CaptureError as error:
        ...     print(error)
        cpu has no graphs
    """


def launched_together(
    operations: Operations, inputs: Sequence[Tensor], recording: fx.GraphModule | None = None
) -> Operations:
    """The same operations, launched as one graph of their device.

    They run at once on the inputs, some times, and the graph's results are compared with theirs.
    The graph keeps the memory of all intermediate results; graphs of a process share it.

    Args:
        operations: what is launched. It draws no random numbers, changes none of its inputs, and
            nothing in it waits for the device.
        inputs: on one device. Later ones have the same shapes, strides, types and device.
        recording: what the operations were made of, if it is known. The tensors that it closes over
            keep their values.

    Returns:
        A function of such inputs. Its results have memory of their own.

    Raises:
        CaptureError: something is elsewhere, or the device cannot do it, for lack of memory say.

    Example:
        >>> import torch
        >>> from metarun.unroll import launched_together, recorded
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"
        >>> launching = launched_together if device == "cuda" else None
        >>> slope = recorded(torch.func.grad(lambda x: x.square().sum()), launching=launching)
        >>> slope(torch.ones(2, device=device)).tolist()
        [2.0, 2.0]
    """
    devices = {tensor.device for tensor in inputs}
    if len(devices) != 1:
        where = " and ".join(sorted(map(str, devices)))
        raise CaptureError(f"its inputs are on {where}" if devices else "it has no inputs")
    (device,) = devices
    capture = CAPTURES.get(device.type)
    if capture is None:
        raise CaptureError(f"{device.type} has no graphs")
    if recording is not None and _has_host_tensors(recording, device):
        raise CaptureError("tensors of the CPU take part")
    closed_over = [] if recording is None else constants(recording)
    try:
        with torch.no_grad(), _one_at_a_time:
            return _Launched(operations, inputs, closed_over, partial(capture, device))
    except CaptureError:
        raise
    except RuntimeError as error:
        # What a capture fails of comes before the complaint that it has failed.
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        reason = str(first).partition("\n")[0]
        raise CaptureError(f"{type(first).__name__}: {reason}") from error


class _Launched:
    """See `launched_together`."""

    def __init__(
        self,
        operations: Operations,
        inputs: Sequence[Tensor],
        closed_over: list[Tensor],
        capture: Callable[[Callable[[], Sequence[Tensor]]], tuple[Sequence[Tensor], Any]],
    ) -> None:
        self.operations = operations  # the graph reads what they close over
        self.read = [_like(tensor) for tensor in inputs]
        _copy(self.read, inputs)
        with undone(closed_over):
            expected = [result.clone() for result in operations(*self.read)]
        with undone(closed_over):
            self.written, self.launch = capture(lambda: operations(*self.read))
        with undone(closed_over, unseen=True):
            found = self(*inputs)
        if not agree(expected, found, lambda: self(*inputs)):
            raise CaptureError("as a graph they give something else")

    def __call__(self, *given: Tensor) -> list[Tensor]:
        with torch.no_grad(), _one_at_a_time:
            _copy(self.read, given)
            self.launch()
            results = [_like(tensor) for tensor in self.written]
            _copy(results, self.written)
        return results


def constants(recording: fx.GraphModule) -> list[Tensor]:
    """The tensors that a recorded function closes over."""
    found = [
        getattr(recording, node.target)
        for node in recording.graph.nodes
        if node.op == "get_attr" and isinstance(node.target, str)
    ]
    return [value for value in found if isinstance(value, Tensor)]


def _has_host_tensors(recording: fx.GraphModule, device: torch.device) -> bool:
    """Whether tensors of the CPU take part, whose values a graph would keep: but for numbers."""
    values = [node.meta.get("val") for node in recording.graph.nodes]
    seen = [value for value in values if isinstance(value, Tensor)] + constants(recording)
    return any(value.device.type != device.type and value.dim() > 0 for value in seen)


CAPTURES: dict[str, Capture] = {"cuda": captured_by_cuda}
"""How the operations of a device are captured, by its type."""


def _like(tensor: Tensor) -> Tensor:
    """An empty tensor with the same shape and strides, expanded dimensions included."""
    dense = _once(tensor)
    made = torch.empty_strided(
        dense.shape, dense.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return made.expand(tensor.shape)


def _once(tensor: Tensor) -> Tensor:
    """The part of a tensor that has each element of its memory once."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _copy(to: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Copy each tensor to another of its form: those of a type together, in few kernels."""
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for one, other in zip(to, given, strict=True):
        pairs[one.dtype].append((_once(one), _once(other)))
    with torch.no_grad():
        for own in pairs.values():
            foreach_copy([one for one, _ in own], [other for _, other in own])
