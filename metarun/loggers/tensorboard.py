"""TensorBoard events in `tb/` of the run directory."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from metarun.config import NEUTRAL_KEYS
from metarun.loggers.base import Logged, Record
from metarun.metrics import ELAPSED


class TensorBoard:
    """Scalars by meta-step, charts that put the splits side by side, settings to compare.

    There is one event file. A later attempt writes a new one, begins it with what still counts
    of the log, and then empties the earlier one. To go on in a second file and let TensorBoard
    drop what is logged again (`purge_step`) would not do: it reads files in the order of the
    clock times in their names, which a wrong clock confuses, and curves over inner steps are not
    logged by meta-step. The mark of a restart at step 0 is for a TensorBoard that is running.
    """

    def __init__(self, run: Logged) -> None:
        folder = run.directory / "tb"
        self._earlier = list(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=0, flush_secs=10)
        file_writer: Any = self._writer.file_writer  # untyped in torch
        file_writer.add_summary(custom_scalars(charts(run.score)))  # type: ignore[no-untyped-call]
        file_writer.add_summary(_session_start(run.settings))
        self._writer.flush()

    def repeat(self, log: Sequence[Mapping[str, Any]]) -> None:
        begun = time.time() - max((record.get(ELAPSED) or 0.0 for record in log), default=0.0)
        for record in log:
            values = {tag: v for tag, v in record.items() if tag not in ("step", ELAPSED)}
            self._write(record["step"], values, begun + (record.get(ELAPSED) or 0.0))
        self._writer.flush()
        for path in self._earlier:
            if path.stat().st_size:
                os.truncate(path, 0)  # a TensorBoard that is reading it would stumble if it went
            else:
                path.unlink()

    def metrics(self, step: int, values: Record) -> None:
        self._write(step, values, time.time())

    def _write(self, step: int, values: Record, when: float) -> None:
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step, walltime=when)

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        for tag, values in curves.items():
            for inner_step, value in enumerate(values):
                self._writer.add_scalar(tag, value, inner_step)
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, completed: bool) -> None:
        self._writer.close()


def charts(score: str) -> dict[str, dict[str, list[Any]]]:
    """The layout of the CUSTOM SCALARS page: training, validation and test in one chart.

    Tags are regular expressions there: without its end, test/loss would bring in the curve over
    inner steps too.
    """
    return {
        "meta-training": {
            name: ["Multiline", [f"^{split}/{name}$" for split in ("train", "val", "test")]]
            for name in (score, "loss")
        },
        "inner loop, by inner step": {
            name: ["Multiline", [f"^test/{name}_by_inner_step$"]] for name in (score, "loss")
        },
    }


def _session_start(settings: Mapping[str, Any]) -> Any:
    """The settings for the HPARAMS page, in the run's own event file.

    `SummaryWriter.add_hparams` would add a second, timestamped run. And no list of columns is
    written: TensorBoard takes the one of the first run for all of them, so that a sweep's other
    runs would lack the settings that only they have; without one it gathers them.
    """
    plain = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None and key not in NEUTRAL_KEYS and key != "plugins"
    }
    _, session, _ = hparams(plain, {})  # type: ignore[no-untyped-call]
    return session
