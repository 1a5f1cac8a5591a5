"""What a run computes over and over, as functions that may be recorded (`engine.compile`).

`Setup.gradient` is the meta-gradient of a meta-batch and its metrics, `Setup.trace` the
evaluation of a batch of tasks.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metarun.algos.base import Algorithm, Trace
from metarun.errors import ConfigError
from metarun.files import cache_dir
from metarun.layout import channels_last
from metarun.plan import Plan
from metarun.unroll import (
    CompilationError,
    Meta,
    Program,
    Recorded,
    RecordingError,
    mean_gradient,
    recorded,
    task_mapping,
)

Gradient = Callable[[Meta, Any], tuple[dict[str, Tensor], Tensor]]
"""`(meta, tasks) -> (mean gradients by name, row of metrics)`; see `summarise`."""

Traces = Callable[[Meta, Any], Trace]
"""`(meta, tasks) -> trace`, each part with a first dimension of tasks."""

NORM = 2
"""Place of the gradient's norm in a row of metrics."""

CALLS_BEFORE_RECORDING = 2  # a run of a few meta-steps is not worth a recording
# Beyond, inductor takes minutes, and a replay gains no time for the memory that recording takes.
MOST_OPERATIONS = 10_000

log = logging.getLogger(__name__)


def gradient_program(algorithm: Algorithm, plan: Plan) -> Gradient:
    """The mean gradient and the metrics of a meta-batch.

    A run is compiled from its first meta-step on, wherever it is resumed, so that its bits do not
    depend on when it was interrupted.
    """
    loss = channels_last(algorithm.loss) if plan.channels_last else algorithm.loss
    record = recording(plan.compile)
    return mean_gradient(loss, plan.batching, plan.chunk, record, summarise, plan.threads)


def trace_program(algorithm: Algorithm, plan: Plan) -> Traces:
    """The evaluation of a batch of tasks."""
    trace = channels_last(algorithm.trace) if plan.channels_last else algorithm.trace
    record = recording(plan.evaluate)
    return task_mapping(trace, plan.batching, record=record, threads=plan.threads)


def summarise(grads: Meta, extra: dict[str, Tensor]) -> tuple[Meta, Tensor]:
    """The gradients, and (mean loss, mean score, norm of the gradient, inner losses)."""
    loss, inner = extra["loss"].mean(), extra["inner_losses"].mean(dim=0)
    norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
    head = [loss, extra["score"].mean().to(loss.dtype), torch.linalg.vector_norm(norms)]
    return grads, torch.cat([torch.stack(head), inner])


def recording(choice: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a value of `engine.compile` does to a function.

    "auto" replays what can be recorded, which gives the same bits, and leaves the rest alone;
    "auto inductor" compiles it if it can be compiled.
    """
    if choice == "none":
        return lambda fn: fn
    if choice == "auto":
        return lambda fn: Recording([_replayed(fn), fn])
    if choice == "auto inductor":
        return lambda fn: Recording([_compiled(fn, MOST_OPERATIONS), _replayed(fn), fn])
    if choice == "inductor":
        return lambda fn: Recording([_compiled(fn)], choice)
    return lambda fn: Recording([recorded(fn)], choice)


class Recording:
    """A function in the first of several ways that turns out to be possible.

    Args:
        ways: `Recorded` ones, and perhaps the function itself as the last.
        insisted: the value of `engine.compile` that leaves no choice, if there is one.
    """

    def __init__(self, ways: list[Callable[..., Any]], insisted: str | None = None) -> None:
        self.ways, self.insisted = ways, insisted

    def __call__(self, *args: Any) -> Any:
        return self._first(lambda way: way(*args))

    def program(self, *args: Any) -> Program | None:
        """See `Recorded.program`; None if the function is not recorded."""
        program: Program | None = self._first(
            lambda way: way.program(*args) if isinstance(way, Recorded) else None
        )
        return program

    def _first(self, act: Callable[[Callable[..., Any]], Any]) -> Any:
        while True:
            way = self.ways[0]
            try:
                return act(way)
            except RecordingError as error:
                if self.insisted is not None:
                    raise ConfigError(
                        f"engine.compile={self.insisted}: the algorithm or the network cannot be "
                        f"recorded: {error}; use engine.compile=none"
                    ) from error
                failed = "compiled" if isinstance(error, CompilationError) else "recorded"
                log.info("meta-steps are not %s: %s", failed, error)
                # What cannot be recorded for a compiler cannot be for a replay either.
                del self.ways[: 1 if isinstance(error, CompilationError) else -1]


def _replayed(fn: Callable[..., Any]) -> Recorded:
    return recorded(fn, after=CALLS_BEFORE_RECORDING, most_operations=MOST_OPERATIONS)


def _compiled(fn: Callable[..., Any], most_operations: int | None = None) -> Recorded:
    return recorded(fn, "inductor", most_operations=most_operations, making=_announced)


@contextmanager
def _announced() -> Iterator[None]:
    """Words around a compilation: it takes a while. Its results are kept."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    # It warns of a CUDA toolkit without a GPU, which is no concern of a run on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    log.info("compiling, for up to some minutes; engine.compile=replay starts at once")
    start = time.monotonic()
    yield
    log.info("compiled in %.0f s", time.monotonic() - start)
