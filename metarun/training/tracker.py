"""What a run shows while it goes: metrics.jsonl, loggers, the progress bar, log lines."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from metarun.rundir.metrics import ELAPSED, cut_back
from metarun.system.files import finite, naming
from metarun.training.loggers import Logger

log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics to `metrics.jsonl` and to loggers, and shows progress on stderr.

    On a terminal there is a bar; elsewhere, in a batch job's log say, there are lines. When a
    run goes on from step `start`, what an earlier attempt logged after that step is dropped,
    since it will be logged again; so is a validation after step `last_eval`. Time goes on from
    `elapsed`, the seconds that the checkpoint counts.

    Without a directory it writes and shows nothing, as all ranks do but the first.
    """

    def __init__(
        self,
        directory: Path | None,
        start: int,
        last_eval: int,
        steps: int,
        elapsed: float = 0.0,
        loggers: Sequence[Logger] = (),
    ) -> None:
        path = directory / "metrics.jsonl" if directory else Path(os.devnull)
        kept = cut_back(path, start, last_eval) if directory else []
        self._file = open(path, "a")  # noqa: SIM115 (closed in __exit__)
        self._loggers = loggers
        for logger in loggers:
            logger.repeat(kept)
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=None if directory else True,
            unit="step",
            dynamic_ncols=True,
        )
        self._steps = steps
        self._done, self._since = 0, time.perf_counter()
        # A checkpoint of an earlier version does not count them: then from the last line.
        logged: list[float] = [r[ELAPSED] for r in kept if type(r.get(ELAPSED)) is float]
        self._zero = self._since - max([elapsed, *logged])
        self._redirect = contextlib.ExitStack()

    def __enter__(self) -> "Tracker":
        if not self._bar.disable:
            self._redirect.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._redirect.close()
        with contextlib.suppress(OSError):  # a failed flush has been reported already
            self._file.close()
        for logger in self._loggers:
            logger.close(completed=kind is None)

    def advance(self) -> None:
        """One meta-step is done."""
        self._done += 1
        self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context time does not count as training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def steps_per_second(self) -> float:
        """Speed of the meta-steps since the last call."""
        now = time.perf_counter()
        speed = self._done / (now - self._since)
        self._done, self._since = 0, now
        return speed

    def elapsed(self) -> float:
        """Seconds that the meta-steps so far have taken, in all attempts, with validations.

        What an attempt did after the checkpoint that the next one started from is not counted.
        """
        return time.perf_counter() - self._zero

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics by tag ("train/loss", …)."""
        known = finite(dict(values))
        entry = {"step": step, **known, ELAPSED: round(self.elapsed(), 3)}
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
        for logger in self._loggers:
            logger.metrics(step, known)

    def sync(self) -> None:
        """Flush the log to disk: no checkpoint may outlast the lines from before it."""
        os.fsync(self._file.fileno())

    def show(self, step: int, values: Mapping[str, str]) -> None:
        """Show a few figures: behind the bar, or as a log line where there is no bar."""
        if self._bar.disable:
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            log.info("step %d/%d  %s", step, self._steps, shown)
        else:
            self._bar.set_postfix(values, refresh=False)

    def note(self, step: int, text: str) -> None:
        """Show a line that stays: above the bar where there is one."""
        log.info("step %d/%d  %s", step, self._steps, text)

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        """Tell the loggers the figures of the finished run, and its curves over inner steps."""
        for logger in self._loggers:
            logger.final(figures, curves, step)
