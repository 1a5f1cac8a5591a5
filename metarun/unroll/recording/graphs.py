"""Operations launched together, as one graph of the device (CUDA graphs).

A replay calls each operation from Python. On a GPU that takes longer than a small operation itself.
Here all are captured once, at fixed places in memory, and a call launches them together. Inputs are
copied to where the operations read them, and results from where they were written: so what a call
gives stays as it is when there is another one.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metarun.unroll._torch import foreach_copy
from metarun.unroll.recording.comparison import agree

Operations = Callable[..., Sequence[Tensor]]
"""Operations on tensors, which take no derivative and have no Python in between."""

Capture = Callable[[torch.device, Callable[[], Sequence[Tensor]]], tuple[Sequence[Tensor], Any]]
"""`capture(device, run) -> (results, launch)`.

The results are where each `launch()` writes them. `run` is called several times.
"""

WARM_UPS = 3  # calls before a capture, in which libraries set themselves up


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


def launched_together(operations: Operations, inputs: Sequence[Tensor]) -> Operations:
    """The same operations, launched as one graph of their device.

    They run at once on the inputs, some times, and the graph's results are compared with theirs.
    The graph keeps the memory of all intermediate results; graphs of a process share it.

    Args:
        operations: what is launched. It draws no random numbers, and nothing in it waits for the
            device.
        inputs: on one device. Later ones have the same shapes, strides, types and device.

    Returns:
        A function of such inputs, for one thread at a time. Its results have memory of their own.

    Raises:
        CaptureError: an input is elsewhere, or the device cannot do it.

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
        raise CaptureError(f"its inputs are on {' and '.join(sorted(map(str, devices)))}")
    (device,) = devices
    capture = CAPTURES.get(device.type)
    if capture is None:
        raise CaptureError(f"{device.type} has no graphs")
    read = [_like(tensor) for tensor in inputs]
    _copy(read, inputs)
    with torch.no_grad():
        try:
            written, launch = capture(device, lambda: operations(*read))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise CaptureError(f"{type(error).__name__}: {reason}") from error

        def launched(*given: Tensor) -> list[Tensor]:
            _copy(read, given)
            launch()
            results = [_like(tensor) for tensor in written]
            _copy(results, written)
            return results

        if not agree(list(operations(*inputs)), launched(*inputs), lambda: launched(*inputs)):
            raise CaptureError("as a graph they give something else")
    return launched


def _captured_by_cuda(
    device: torch.device, run: Callable[[], Sequence[Tensor]]
) -> tuple[Sequence[Tensor], Any]:
    # On a stream of its own, as a capture must be.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may ask the device for something meanwhile: those of several ranks do.
    with torch.cuda.graph(graph, _memory(), stream, capture_error_mode="thread_local"):
        written = run()
    return written, graph.replay


@cache
def _memory() -> Any:
    """The memory of intermediate results. Graphs run one after the other, and so share it."""
    return torch.cuda.graph_pool_handle()


CAPTURES: dict[str, Capture] = {"cuda": _captured_by_cuda}
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
    with torch.no_grad():
        foreach_copy([_once(tensor) for tensor in to], [_once(tensor) for tensor in given])
