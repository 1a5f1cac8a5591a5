"""What a run shows while it goes: metrics.jsonl, TensorBoard, the progress bar, log lines."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from metarun.files import finite, write_text

log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics to `metrics.jsonl` and `tb/`, and shows progress on stderr.

    On a terminal there is a bar; elsewhere, in a batch job's log say, there are lines. When a
    run goes on from step `start`, what an earlier attempt logged after that step is dropped
    from both, since it will be logged again; so is a validation after step `last_eval`.
    """

    def __init__(self, directory: Path, start: int, last_eval: int, steps: int) -> None:
        path = directory / "metrics.jsonl"
        kept = _keep_until(path, start, last_eval)
        self._file = open(path, "a")  # noqa: SIM115 (closed in __exit__)
        # TensorBoard drops all of an earlier attempt's events from `purge_step` on, so those
        # of step `start` itself are written once more.
        self._writer = SummaryWriter(str(directory / "tb"), purge_step=start, flush_secs=10)
        for record in kept:
            if record["step"] == start:
                self._scalars(record)
        self._bar = tqdm(total=steps, initial=start, disable=None, unit="step", dynamic_ncols=True)
        self._steps = steps
        self._done, self._since = 0, time.perf_counter()
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
        self._writer.close()
        self._file.close()

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

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics by TensorBoard tag ("train/loss", …)."""
        record = {"step": step, **values}
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()
        self._scalars(record)

    def _scalars(self, record: Mapping[str, Any]) -> None:
        for tag, value in record.items():
            if tag != "step" and value is not None:
                self._writer.add_scalar(tag, value, record["step"])

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

    def curve(self, tag: str, values: list[float]) -> None:
        """Record a curve over inner steps: the x axis of its chart is the inner step."""
        for inner_step, value in enumerate(values):
            self._writer.add_scalar(tag, value, inner_step)

    def hparams(self, config: Mapping[str, Any], results: Mapping[str, float], step: int) -> None:
        """Record settings and final figures for TensorBoard's HPARAMS page.

        Written into this run's own event file; `SummaryWriter.add_hparams` would add a
        second, timestamped run.
        """
        plain = {k: v if type(v) in (int, float, bool, str) else str(v) for k, v in config.items()}
        file_writer: Any = self._writer.file_writer  # untyped in torch, as is `hparams`
        for summary in hparams(plain, dict(results)):  # type: ignore[no-untyped-call]
            file_writer.add_summary(summary)
        for tag, value in results.items():
            self._writer.add_scalar(tag, value, step)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a crash cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _keep_until(path: Path, step: int, last_eval: int) -> list[dict[str, Any]]:
    """Cut a metrics.jsonl back to what a checkpoint knows of, and return that."""
    kept = [
        record
        for record in read_metrics(path)
        if record["step"] <= step
        and not (record["step"] > last_eval and any(tag.startswith("val/") for tag in record))
    ]
    if path.exists():
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept
