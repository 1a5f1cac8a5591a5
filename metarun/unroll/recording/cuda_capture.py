"""Capturing operations as a CUDA graph, so that a capture that fails leaves nothing behind."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metarun.unroll._torch import clear_cublas_workspaces

WARM_UPS = 3  # calls before a capture, in which libraries set themselves up


def captured_by_cuda(
    device: torch.device, run: Callable[[], Sequence[Tensor]]
) -> tuple[Sequence[Tensor], Any]:
    """Capture operations on a CUDA device.

    Args:
        run: runs them, always on the same tensors. It is called several times.

    Returns:
        Their results, where each launch writes them, and what launches them.

    Raises:
        RuntimeError: they wait for the device, or it cannot capture them.
    """
    current, stream = torch.cuda.current_stream(device), _stream(device)
    # The outer two put device and stream back, which a capture that fails does not.
    with torch.cuda.device(device), torch.cuda.stream(current):
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS - 1):
                    run()
                with _no_waiting():  # better here than within a capture
                    run()
        finally:
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the device for something meanwhile: those of ranks do.
        capture = torch.cuda.graph(graph, _memory(), stream, capture_error_mode="thread_local")
        with _no_collection(), _own_workspaces(), capture:
            written = run()
    return written, graph.replay


@cache
def _stream(device: torch.device) -> Any:
    """The stream of all captures: graphs share no memory across streams."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _memory() -> Any:
    """The memory of intermediate results. Graphs run one after the other, and so share it."""
    return torch.cuda.graph_pool_handle()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """An error where the host waits for the device, as far as torch notices."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: an older graph that is would end the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS takes workspaces within the block alone: they belong to the graph then.

    One of before would be freed with another graph of its stream.
    """
    clear_cublas_workspaces()
    try:
        yield
    finally:
        clear_cublas_workspaces()
