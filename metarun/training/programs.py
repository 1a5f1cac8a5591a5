"""What a run computes over and over, as functions that may be recorded (`engine.compile`).

`Setup.gradient` is the meta-gradient of a meta-batch and its metrics, `Setup.trace` the
evaluation of a batch of tasks.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from metarun.components.algo.base import Algorithm, Trace
from metarun.errors import ConfigError, MetarunError, RunError
from metarun.system.files import cache_dir
from metarun.system.memory import giving_back
from metarun.training.layout import channels_last
from metarun.training.metrics import Metrics, summarise
from metarun.training.plan import Plan
from metarun.unroll import (
    CaptureError,
    ChangedFunction,
    CompilationError,
    Meta,
    Program,
    Recorded,
    RecordingError,
    launched_together,
    mean_gradient,
    recorded,
    task_mapping,
)
from metarun.unroll._torch import pytree
from metarun.unroll.effects.python_state import changed, python_state
from metarun.unroll.recording.graphs import Operations
from metarun.unroll.recording.recorded import Backend

Gradient = Callable[..., tuple[dict[str, Tensor], Metrics]]
"""`(meta, tasks, meta-steps done = 0) -> (mean gradients and next kept values, metrics)`."""

Traces = Callable[[Meta, Any], Trace]
"""`(meta, tasks) -> trace`, each part with a first dimension of tasks."""

Outputs = Callable[[Meta, Any], Tensor]
"""`(meta, tasks) -> outputs`, (tasks, inner steps + 1, queries, outputs)."""

Advance = Callable[[Meta, Any, int], dict[str, Tensor]]
"""`(meta, what a meta-step learned from, meta-steps done) -> next kept values, if they are due`."""

CALLS_BEFORE_RECORDING = 2  # a run of a few meta-steps is not worth a recording
# Beyond, inductor takes minutes, and a replay gains no time for the memory that recording takes.
MOST_OPERATIONS = 10_000

log = logging.getLogger(__name__)


def gradient_program(algorithm: Algorithm, plan: Plan, record: "Recorder") -> Gradient:
    """The mean gradient and the metrics of a meta-batch.

    A run is compiled from its first meta-step on, wherever it is resumed, so that its bits do not
    depend on when it was interrupted.
    """
    loss = channels_last(algorithm.loss) if plan.channels_last else algorithm.loss
    if not algorithm.kept and not algorithm.follows_step:
        plain = mean_gradient(loss, plan.batching, plan.chunk, record, summarise, plan.threads)
        return lambda meta, tasks, step=0: plain(meta, tasks)

    def with_inputs(learned: Meta, given: tuple[Any, Meta, list[Tensor]]) -> Any:
        task, kept, step = given
        return loss({**learned, **kept}, task, *step)

    program = mean_gradient(with_inputs, plan.batching, plan.chunk, record, summarise, plan.threads)

    def gradient(meta: Meta, tasks: Any, step: int = 0) -> tuple[dict[str, Tensor], Metrics]:
        # What is kept, and the step, are inputs: a recording would repeat the values it was made
        # with. They come with the tasks, since no derivative is taken by them.
        first = pytree.tree_leaves(tasks)[0]
        kept = {n: meta[n].detach().expand(len(first), *meta[n].shape) for n in algorithm.kept}
        learned = {name: value for name, value in meta.items() if name not in kept}
        now = torch.full((), step, dtype=torch.float64, device=first.device).expand(len(first))
        found: tuple[dict[str, Tensor], Metrics] = program(
            learned, (tasks, kept, [now] if algorithm.follows_step else [])
        )
        return found

    return gradient


def trace_program(algorithm: Algorithm, plan: Plan, record: "Recorder") -> Traces:
    """The evaluation of a batch of tasks; of a batch of examples, where one model is trained."""
    trace = channels_last(algorithm.trace) if plan.channels_last else algorithm.trace
    if algorithm.one_model is None:
        return task_mapping(trace, plan.batching, plan.evaluate_chunk, record, plan.threads)
    mapping = task_mapping(trace, "loop", record=record)

    def of_batch(meta: Meta, batch: Any) -> Trace:
        found = mapping(meta, pytree.tree_map(lambda part: part[None], batch))
        return Trace(*(part[0] for part in found))

    return of_batch


def advance_program(algorithm: Algorithm, plan: Plan, record: "Recorder") -> Advance | None:
    """The steps that one model takes after meta-steps, if the algorithm has some."""
    one = algorithm.one_model
    if one is None or one.advance is None:
        return None
    advance, every = channels_last(one.advance) if plan.channels_last else one.advance, one.every
    mapping = task_mapping(advance, "loop", record=record)

    def advanced(meta: Meta, given: Any, step: int) -> dict[str, Tensor]:
        if step % every:
            return {}
        constants = {name: value.detach() for name, value in meta.items()}
        # Contiguous, as a checkpoint gives them back.
        return {name: value[0].contiguous() for name, value in mapping(constants, given).items()}

    return advanced


def outputs_program(algorithm: Algorithm, plan: Plan, record: "Recorder") -> Outputs:
    """The outputs for the queries of a batch of tasks, in an evaluation."""
    assert algorithm.outputs is not None
    outputs = channels_last(algorithm.outputs) if plan.channels_last else algorithm.outputs
    return task_mapping(outputs, plan.batching, plan.evaluate_chunk, record, plan.threads)


LOST = "a checkpoint does not hold what is kept in Python, so a resumed run differs"


class _Unrecorded:
    """A function that is called as it is, and tells once of what it keeps in Python.

    Attributes:
        told: whether it has.
    """

    def __init__(self, fn: Callable[..., Any], what: str) -> None:
        self.fn, self.what, self.told, self.calls = fn, what, False, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.told or self.calls != 2:  # a first call may set something up
            return self.fn(*args)
        self.told, before = True, python_state(self.fn)
        outcome = self.fn(*args)
        if change := changed(before, python_state(self.fn)):
            log.info("%s change %s at each call; %s", self.what, change, LOST)
        return outcome


class Recorder:
    """What a value of `engine.compile` does to a function; a `Record`.

    "auto" replays what can be recorded, which gives the same bits, and leaves the rest alone;
    "auto inductor" compiles it if it can be compiled.

    Args:
        choice: the value.
        what: what messages call that which the functions compute, in the plural.
        tells: whether what is not recorded tells of what it keeps in Python.
        graphs: whether what is recorded is launched as one graph of the device, if it can be.
    """

    def __init__(self, choice: str, what: str, tells: bool = True, graphs: bool = False) -> None:
        self.choice, self.what, self.tells = choice, what, tells
        self.launching = partial(_launched, what) if graphs else None
        self.made: list[Recording] = []

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        choice, what = self.choice, self.what
        plain = _Unrecorded(fn, what) if self.tells else fn
        if choice == "none":
            return plain
        if choice == "auto":
            made = Recording([self._replayed(fn), plain], what)
        elif choice == "auto inductor":
            compiled = self._recorded(fn, "inductor", most_operations=MOST_OPERATIONS)
            made = Recording([compiled, self._replayed(fn), plain], what)
        else:
            made = Recording([self._recorded(fn, cast(Backend, choice))], what, choice)
        self.made.append(made)
        return made

    def recheck(self) -> None:
        """Compare every recording with its function at the next call."""
        for made in self.made:
            made.recheck()

    def forget(self) -> None:
        """Drop every recording, and the memory that it holds."""
        for made in self.made:
            made.forget()

    def _replayed(self, fn: Callable[..., Any]) -> Recorded:
        return self._recorded(
            fn, "replay", after=CALLS_BEFORE_RECORDING, most_operations=MOST_OPERATIONS
        )

    def _recorded(self, fn: Callable[..., Any], backend: Backend, **limits: Any) -> Recorded:
        making = partial(_announced, self.what) if backend == "inductor" else nullcontext
        return recorded(
            fn, backend, making=making, evaluating=giving_back, launching=self.launching, **limits
        )


class Recording:
    """A function in the first of several ways that turns out to be possible.

    Args:
        ways: `Recorded` ones, and perhaps the function itself as the last.
        what: what it computes, in the plural.
        insisted: the value of `engine.compile` that leaves no choice, if there is one.
    """

    def __init__(
        self, ways: list[Callable[..., Any]], what: str, insisted: str | None = None
    ) -> None:
        self.ways, self.what, self.insisted = ways, what, insisted

    def __call__(self, *args: Any) -> Any:
        return self._first(lambda way: way(*args))

    def program(self, *args: Any) -> Program | None:
        """See `Recorded.program`; None if the function is not recorded."""
        program: Program | None = self._first(
            lambda way: way.program(*args) if isinstance(way, Recorded) else None, called=False
        )
        return program

    def recheck(self) -> None:
        """See `Recorded.recheck`."""
        for way in self.ways:
            if isinstance(way, Recorded):
                way.recheck()

    def forget(self) -> None:
        """See `Recorded.forget`."""
        for way in self.ways:
            if isinstance(way, Recorded):
                way.forget()

    def _first(self, act: Callable[[Callable[..., Any]], Any], called: bool = True) -> Any:
        while True:
            way = self.ways[0]
            try:
                return act(way)
            except ChangedFunction as error:
                self._drop(error)
                if called:
                    return error.outcome[0]
            except RecordingError as error:
                if isinstance(error.__cause__, MetarunError):  # of a function that was refused
                    raise error.__cause__ from error
                compiling = isinstance(error, CompilationError)
                failed = "compiled" if compiling else "recorded"
                if self.insisted is not None:
                    instead = "replay or none" if compiling else "none"
                    raise ConfigError(
                        f"engine.compile={self.insisted}: {self.what} with this algorithm and this "
                        f"network cannot be {failed}: {error}; use engine.compile={instead}"
                    ) from error
                log.info("%s are not %s: %s", self.what, failed, error)
                # What cannot be recorded for a compiler cannot be for a replay either.
                del self.ways[: 1 if compiling else -1]

    def _drop(self, error: ChangedFunction) -> None:
        """Go on with the function itself, and say so.

        Every rank comes to this by itself: all have the same function and count its calls.
        """
        since = error.replays
        if self.insisted is not None:
            kind = RunError if since else ConfigError
            raise kind(
                f"engine.compile={self.insisted}: {self.what} cannot be recorded: {error}; use "
                "engine.compile=none"
            ) from error
        if since:
            log.warning(
                "%s are no longer recorded: %s. The %d calls before may have had an old value: to "
                "be sure, begin again with engine.compile=none; %s", self.what, error, since, LOST,
            )  # fmt: skip
        else:
            log.info("%s are not recorded: %s; %s", self.what, error, LOST)
        del self.ways[:-1]
        if isinstance(last := self.ways[-1], _Unrecorded):
            last.told = True


def _launched(
    what: str, operations: Operations, inputs: Sequence[Tensor], recording: fx.GraphModule
) -> Operations:
    """The operations as one graph of the device, or as they are."""
    try:
        return launched_together(operations, inputs, recording)
    except CaptureError as error:
        # As text: the error holds what was computed until then.
        log.info("%s are not launched as one CUDA graph: %s", what, str(error))
        return operations


def keep_compiled() -> None:
    """Have torch keep what it compiles in metarun's cache, if the user has chosen no place.

    To be called before anything imports torch's compiler, as making an optimizer does: it chooses
    a place at that moment. Where the cache cannot be made, that choice stands.
    """
    place = cache_dir() / "compiled"
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place))


@contextmanager
def _announced(what: str) -> Iterator[None]:
    """Words around a compilation: it takes a while."""
    # It warns of a CUDA toolkit without a GPU, which is no concern of a run on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("torch._inductor.ir").setLevel(logging.ERROR)  # of operations it only calls
    log.info("compiling %s, for up to some minutes; engine.compile=replay starts at once", what)
    start = time.monotonic()
    try:
        yield
    except OSError as error:
        place = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the folder of temporary files")
        raise RunError(
            f"compiled programs cannot be kept in {place}: {error.strerror or error}; set "
            "METARUN_CACHE to another folder, or use engine.compile=replay"
        ) from error
    log.info("compiled %s in %.0f s", what, time.monotonic() - start)
