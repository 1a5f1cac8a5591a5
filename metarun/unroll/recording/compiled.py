"""Recordings compiled by inductor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from metarun.unroll._torch import inductor
from metarun.unroll.recording.capture import RecordingError
from metarun.unroll.recording.graphs import Operations

LONG = 2000
"""Operations from which on it pays to build the calls of kernels apart: torch's headers are then
prepared twice, once on a machine."""


class CompilationError(RecordingError):
    """A recording cannot be compiled, but perhaps replayed."""


def compiled(graph: fx.GraphModule, leaves: Sequence[Tensor]) -> Operations:
    """A recording compiled for inputs like these.

    Raises:
        CompilationError: inductor fails.
        OSError: what it writes cannot be written: another time it might be.
    """
    # Not torch.compile: what its guards would check at each call is the key of the recording.
    config, standalone_compile = inductor()
    given: list[Any] = [leaf.detach() for leaf in leaves]
    # On a CPU the calls of the kernels are compiled as well: Python's would hold its lock (GIL)
    # while a kernel runs, so the kernels of tasks in several threads would wait for each other.
    cpu = all(leaf.device.type == "cpu" for leaf in leaves)
    # Those calls are one function. Where it is long, the C++ compiler takes most of its time to
    # optimise it as it does kernels, and it runs no faster. Built apart, it is hardly optimised.
    apart = len(graph.graph.nodes) > LONG
    by_wrapper = {"cpp_wrapper": True, "cpp_wrapper_build_separate": apart} if cpu else {}
    try:
        with torch.no_grad(), config.patch(by_wrapper):
            program: Any = standalone_compile(graph, given, dynamic_shapes="from_example_inputs")
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # what torch wraps
        if isinstance(inner, OSError):
            raise inner from None
        reason = str(error).partition("\n")[0]
        raise CompilationError(f"inductor fails: {type(error).__name__}: {reason}") from error
    return program  # type: ignore[no-any-return]
