"""TensorBoard events in `tb/` of the run directory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from metarun.config import NEUTRAL_KEYS
from metarun.loggers.base import Logged, Record

FINAL = ".final"  # suffix of the event file that holds the end of a run


class TensorBoard:
    """Scalars by meta-step, charts that put the splits side by side, settings to compare.

    Each attempt has an event file. What earlier attempts logged from meta-step `start` on
    will be logged again: TensorBoard drops theirs (`purge_step`). That knows of meta-steps only,
    so the curves over inner steps go to a file of their own, which a later attempt replaces.
    """

    def __init__(self, run: Logged) -> None:
        self._folder = run.directory / "tb"
        for old in self._folder.glob(f"events.*{FINAL}"):
            old.unlink()
        self._writer = SummaryWriter(str(self._folder), purge_step=run.start, flush_secs=10)
        file_writer: Any = self._writer.file_writer  # untyped in torch
        file_writer.add_summary(custom_scalars(charts(run.score)))  # type: ignore[no-untyped-call]
        file_writer.add_summary(_session_start(run.settings))
        self._writer.flush()

    def repeat(self, step: int, values: Record) -> None:
        self.metrics(step, values)

    def metrics(self, step: int, values: Record) -> None:
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        writer = SummaryWriter(str(self._folder), filename_suffix=FINAL)
        for tag, values in curves.items():
            for inner_step, value in enumerate(values):
                writer.add_scalar(tag, value, inner_step)
        for tag, value in figures.items():
            writer.add_scalar(tag, value, step)
        writer.close()

    def close(self, completed: bool) -> None:
        self._writer.close()


def charts(score: str) -> dict[str, dict[str, list[Any]]]:
    """The layout of the CUSTOM SCALARS page: training, validation and test in one chart."""
    return {
        "meta-training": {
            score: ["Multiline", [f"{split}/{score}" for split in ("train", "val", "test")]],
            "loss": ["Multiline", [f"{split}/loss" for split in ("train", "val", "test")]],
        },
        "inner loop, by inner step": {
            score: ["Multiline", [f"test/{score}_by_inner_step"]],
            "loss": ["Multiline", ["test/loss_by_inner_step"]],
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
