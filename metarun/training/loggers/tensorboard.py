"""TensorBoard events in `tb/` of the run directory."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

from metarun.config.run import NEUTRAL_KEYS
from metarun.rundir.metrics import ELAPSED
from metarun.system.files import naming
from metarun.training.loggers.base import Logged, Record


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
        self._events = EventFile(folder)
        self._events.write(session_log=SessionLog(status=SessionLog.START))
        layout = custom_scalars(charts(run.score))  # type: ignore[no-untyped-call]
        self._events.write(summary=layout)
        self._events.write(summary=_session_start(run.settings))
        self._events.flush()

    def repeat(self, log: Sequence[Mapping[str, Any]]) -> None:
        begun = time.time() - max((entry.get(ELAPSED) or 0.0 for entry in log), default=0.0)
        for entry in log:
            values = {tag: v for tag, v in entry.items() if tag not in ("step", ELAPSED)}
            when = begun + (entry.get(ELAPSED) or 0.0)
            self._events.write(step=entry["step"], wall_time=when, summary=_scalars(values))
        self._events.flush()
        for path in self._earlier:
            if path.stat().st_size:
                os.truncate(path, 0)  # deleting it would upset a TensorBoard that reads it
            else:
                path.unlink()

    def metrics(self, step: int, values: Record) -> None:
        self._events.write(step=step, summary=_scalars(values))
        self._events.flush()

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        for tag, values in curves.items():
            for inner_step, value in enumerate(values):
                self._events.write(step=inner_step, summary=_scalars({tag: value}))
        self._events.write(step=step, summary=_scalars(figures))
        self._events.flush()

    def close(self, completed: bool) -> None:
        self._events.close()


class EventFile:
    """A new event file.

    torch's `SummaryWriter` writes from a thread of its own, by the clock, and an error there, as
    on a full disk, shows as a traceback of that thread. This one writes when it is told to.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"{name}.{uuid.uuid4().hex[:8]}"
        self._file = open(self._path, "xb")  # noqa: SIM115 (closed in close)
        self._records = RecordWriter(self._file)
        self.write(file_version="brain.Event:2")

    def write(self, **content: Any) -> None:
        """Add an event; its time is now unless it is given."""
        event = Event(**{"wall_time": time.time(), **content})
        with naming(self._path):
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand all events to the system, so that they outlast this process."""
        with naming(self._path):
            self._file.flush()

    def close(self) -> None:
        """Close the file. A failed flush has been reported already."""
        with contextlib.suppress(OSError):
            self._file.close()


def _scalars(values: Record) -> Summary:
    known = {tag: value for tag, value in values.items() if value is not None}
    return Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in known.items()])


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
