"""What a run computes over and over, as functions that may be recorded (`engine.compile`).

`Setup.gradient` is the meta-gradient of a meta-batch and its metrics, `Setup.trace` the
evaluation of a batch of tasks.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from metarun.algos.base import Algorithm, Trace
from metarun.config import TrainConfig
from metarun.errors import ConfigError
from metarun.files import cache_dir
from metarun.unroll import (
    Backend,
    Batching,
    Meta,
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
MOST_OPERATIONS = 50_000  # half a minute of recording
MOST_COMPILED = 10_000  # operations that inductor may take minutes for
SAVE_MEMORY = ("checkpoint", "mixed")  # values of engine.gradient; inductor and vmap undo it
LONG_RUN = 5000  # meta-steps of milliseconds, which are worth ten seconds of compiling
LONG_RUN_OF_CONVOLUTIONS = 500  # of tenths of a second, which are worth a minute

log = logging.getLogger(__name__)


def gradient_program(
    config: TrainConfig,
    algorithm: Algorithm,
    batching: Batching,
    chunk: int | None,
    compiled: bool,
) -> Gradient:
    """The mean gradient and the metrics of a meta-batch.

    A run is compiled from its first meta-step on, wherever it is resumed, so that its bits do not
    depend on when it was interrupted.

    Args:
        compiled: what `will_compile` says.
    """
    choice = config.engine.compile
    if choice == "auto" and compiled:
        choice = "auto inductor"
    return mean_gradient(algorithm.loss, batching, chunk, recording(choice), summarise)


def trace_program(config: TrainConfig, algorithm: Algorithm, batching: Batching) -> Traces:
    """The evaluation of a batch of tasks.

    `engine.compile=auto` never compiles it: figures are those of a plain `metarun eval`.
    """
    return task_mapping(algorithm.trace, batching, record=recording(config.engine.compile))


def summarise(grads: Meta, extra: dict[str, Tensor]) -> tuple[Meta, Tensor]:
    """The gradients, and (mean loss, mean score, norm of the gradient, inner losses)."""
    loss, inner = extra["loss"].mean(), extra["inner_losses"].mean(dim=0)
    norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
    head = [loss, extra["score"].mean().to(loss.dtype), torch.linalg.vector_norm(norms)]
    return grads, torch.cat([torch.stack(head), inner])


def will_compile(config: TrainConfig, model: nn.Module) -> bool:
    """Whether training is to be compiled: "auto" does so in runs that are long enough to gain.

    Depends on the config and on the machine's software alone.
    """
    if config.engine.compile != "auto":
        return config.engine.compile == "inductor"
    long = config.trainer.steps >= (LONG_RUN_OF_CONVOLUTIONS if convolves(model) else LONG_RUN)
    return long and config.engine.gradient not in SAVE_MEMORY and has_compiler()


def convolves(model: nn.Module) -> bool:
    """Whether a network has convolutions, and so much to compute for each example."""
    return any(isinstance(module, _ConvNd) for module in model.modules())


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which inductor needs on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def recording(choice: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a value of `engine.compile` does to a function.

    "auto" replays what can be recorded, which gives the same bits, and leaves the rest alone;
    "auto inductor" compiles it if it can be compiled.
    """
    if choice == "none":
        return lambda fn: fn
    if choice == "auto":
        return _replayed_if_possible
    if choice == "auto inductor":
        return _compiled_if_possible
    backend: Backend = "inductor" if choice == "inductor" else "replay"

    def insist(fn: Callable[..., Any]) -> Callable[..., Any]:
        run = _announced(recorded(fn, backend)) if backend == "inductor" else recorded(fn)

        def recording(*args: Any) -> Any:
            try:
                return run(*args)
            except RecordingError as error:
                raise ConfigError(
                    f"engine.compile={choice}: the algorithm or the network cannot be recorded: "
                    f"{error}; use engine.compile=none"
                ) from error

        return recording

    return insist


def _replayed_if_possible(fn: Callable[..., Any]) -> Callable[..., Any]:
    run = recorded(fn, after=CALLS_BEFORE_RECORDING, most_operations=MOST_OPERATIONS)
    return _attempted(run, fn, "meta-steps are not recorded: %s")


def _compiled_if_possible(fn: Callable[..., Any]) -> Callable[..., Any]:
    run = _announced(recorded(fn, "inductor", most_operations=MOST_COMPILED))
    return _attempted(run, _replayed_if_possible(fn), "meta-steps are not compiled: %s")


def _announced(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose first call compiles: that takes a while, and its results are kept."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    # It warns of a CUDA toolkit without a GPU, which is no concern of a run on the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = False

    def announced(*args: Any) -> Any:
        nonlocal compiled
        if compiled:
            return run(*args)
        log.info("compiling, for up to some minutes; engine.compile=replay starts at once")
        start = time.monotonic()
        result = run(*args)
        log.info("compiled in %.0f s", time.monotonic() - start)
        compiled = True
        return result

    return announced


def _attempted(
    run: Callable[..., Any], otherwise: Callable[..., Any], words: str
) -> Callable[..., Any]:
    """`run` until it turns out that its function cannot be recorded; then the other."""

    def attempt(*args: Any) -> Any:
        nonlocal run
        try:
            return run(*args)
        except RecordingError as error:
            log.info(words, error)
            run = otherwise
            return run(*args)

    return attempt
