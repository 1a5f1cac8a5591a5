"""One job, alone or in a sweep: what Hydra calls, in this process or in a launcher's."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from metarun import __version__
from metarun.config.compose import to_config
from metarun.config.typed import as_argument
from metarun.errors import ConfigError, MetarunError, first_line, is_about_a_model
from metarun.rundir import SWEEP_FILE
from metarun.rundir.provenance import git_state
from metarun.system.interrupts import Interrupted, Preempted
from metarun.system.turns import taking_turn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended. Plain values only: it crosses processes and machines."""

    status: str  # completed, recalled (it was finished before) or failed
    score: float | None = None  # of the best validation
    error: str | None = None  # one line
    other_code: bool = False  # it ran other code than that which was launched


failed: list[Exception] = []
"""What ended the single job of this process; see `job`."""


def job(run: Callable[[Any, Path], float]) -> Callable[[DictConfig], Any]:
    """Make `run(config, directory)` a task function for Hydra.

    In a sweep it returns an `Outcome` and raises nothing, so that the other runs go on. The
    error of a single run is kept for `raise_failure`, because Hydra would print words of its
    own first. A directory that Hydra made for a command that came to nothing is removed.
    """

    @wraps(run)
    def task(cfg: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        directory = _as_seen_from_here(Path(hydra_config.runtime.output_dir))
        try:
            if hydra_config.mode != RunMode.MULTIRUN:
                refuse_chdir(bool(hydra_config.job.chdir))
            if hydra_config.mode == RunMode.MULTIRUN:
                return _in_a_sweep(run, cfg, directory, Path(hydra_config.sweep.dir))
            return run(to_config(cfg), directory)
        except Preempted as preempted:
            _requeue(preempted)
        except Interrupted as interrupted:
            if hydra_config.mode != RunMode.MULTIRUN:
                interrupted.args = (f"{interrupted}\n{to_go_on('hydra.run.dir', directory)}",)
            raise
        except Exception as error:
            failed.append(error)
            return None
        finally:
            _remove_if_empty(Path(hydra_config.runtime.output_dir))

    return task


def refuse_chdir(wanted: bool) -> None:
    """Refuse to run in the run directory, where relative paths would mean something else.

    Raises:
        ConfigError: it is wanted.
    """
    if wanted:
        raise ConfigError(
            "hydra.job.chdir=true: a run stays in the folder where its command was typed, so that "
            "relative paths mean what they say there; leave it out"
        )


def raise_failure() -> None:
    """Raise the error that ended the single job, if there was one."""
    if failed:
        raise failed.pop()


def _in_a_sweep(
    run: Callable[[Any, Path], float], cfg: DictConfig, directory: Path, sweep: Path
) -> Outcome:
    # A launcher's process has not come by the command line, which does this elsewhere.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    differs = False
    try:
        refuse_chdir(bool(HydraConfig.get().job.chdir))
        differs = _code_differs(sweep)
        with requeued_not_failed(), taking_turn(_turn()):
            return Outcome("completed", run(to_config(cfg), directory), other_code=differs)
    except Exception as error:
        unexpected = not _has_words_of_ours(error)
        shown = unexpected or os.environ.get("METARUN_DEBUG") == "1"
        log.error("this run failed: %s", describe(error), exc_info=error if shown else None)
        return Outcome("failed", error=describe(error), other_code=differs)


def _turn() -> int:
    """The number of this run among those that joblib starts on this machine; else 0."""
    hydra_config = HydraConfig.get()
    at_once = str(hydra_config.launcher.get("_target_", "")).endswith("JoblibLauncher")
    return int(hydra_config.job.num) if at_once else 0


def describe(error: BaseException) -> str:
    """An error as one line; the class is named where the message is not ours."""
    text = first_line(error)
    return text if _has_words_of_ours(error) else f"{type(error).__name__}: {text}"


def _has_words_of_ours(error: BaseException) -> bool:
    return isinstance(error, MetarunError) or is_about_a_model(error)


def to_go_on(key: str, directory: Path) -> str:
    """Says what to type: what was typed, with the directory of the run or of the sweep."""
    given = [a for a in sys.argv[1:] if a.partition("=")[0].lstrip("+") != key]
    return f"to go on: {sys.argv[0]} {shlex.join(given)} {as_argument(key, directory)}"


def code_state() -> dict[str, Any]:
    """Which code this is: the version, and the state of the checkout if it runs from one."""
    return {"version": __version__, "git": git_state()}


def _code_differs(sweep: Path) -> bool:
    """Whether this is other code than that which launched the sweep; says so in the log."""
    from metarun.rundir.directory import read_json

    launched, here = read_json(sweep / SWEEP_FILE).get("code"), code_state()
    if launched is None or launched == here:
        return False
    log.warning("this run uses other code than was launched: %s there, %s here", launched, here)
    return True


def _requeue(preempted: Preempted) -> None:
    """Let submitit, whose handler is in place again, put this job back into the queue.

    It ends the process, or raises what its client gets to see if the job has run out of
    requeues. It only returns in tasks other than the first of a job, which must not requeue.
    """
    log.info("%s; back into the queue", preempted)
    with requeued_not_failed():
        signal.raise_signal(preempted.number)
    sys.exit(0)


@contextlib.contextmanager
def requeued_not_failed() -> Iterator[None]:
    """End the process if the command that requeued its job was killed together with the job.

    That is what happens to `scontrol requeue` if the cluster is quick. To submitit it is an
    error, which its client would take for the end of the job.
    """
    try:
        yield
    except subprocess.CalledProcessError as error:
        if error.returncode < 0 and "requeue" in error.cmd:
            sys.exit(-1)
        raise


def _as_seen_from_here(directory: Path) -> Path:
    """Relative to the working directory if it is below it: what a person would type."""
    here = Path.cwd()
    return directory.relative_to(here) if directory.is_relative_to(here) else directory


def _remove_if_empty(directory: Path) -> None:
    if directory.resolve() == Path.cwd():
        return  # nobody made it for a run: hydra.run.dir=., or a rank without a directory
    with contextlib.suppress(OSError):  # not empty: it holds another run
        directory.rmdir()
