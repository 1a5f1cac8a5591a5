"""A measured figure of a row: taken from its runs, or from a file that has it from elsewhere."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from metarun.config.run import NEUTRAL_KEYS
from metarun.reporting.groups import LOGGED, Group
from metarun.reporting.reading import finite
from metarun.system.untrusted import UntrustedError, json_list

_T = TypeVar("_T")

FREE = (
    *("seed", "device", *LOGGED),
    *(f"engine.{name}" for name in ("batching", "chunk", "compile", "cuda_graphs")),
)
"""Settings that are a matter of the machine, or of how often a row is run."""
IGNORED = {*FREE, *NEUTRAL_KEYS, "plugins"}


@dataclass(frozen=True)
class Measured:
    """What the runs of a row gave together.

    Attributes:
        score: name of the score.
        value: its mean over the seeds.
        ci95: half of its 95 % interval; None if it has none.
        ci95_over: what the interval is over, such as "2000 tasks of 1 seed".
        seeds: of the runs.
        test_tasks: how many each run was tested on.
        task_sets: the name of the test tasks of each run; None where it is not known.
        train_seconds: of one run, with its validations.
        device: what they ran on.
        code: the code that the runs were made with, each once.
        settings: of the runs, by dotted key, but for those that are free.
    """

    score: str
    value: float
    ci95: float | None
    ci95_over: str
    seeds: tuple[int, ...]
    test_tasks: int
    task_sets: tuple[str | None, ...]
    train_seconds: float
    device: str
    code: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def meta_steps(self) -> int:
        """Meta-steps of each run."""
        return int(self.settings["trainer.steps"])


def of_group(group: Group, wanted: dict[str, Any]) -> Measured:
    """The figure of a row's runs.

    Args:
        wanted: the settings of the row. Of runs that differ from each other, those of one that
            differs from the row are kept, so that it is seen.
    """
    runs = sorted(group.runs, key=lambda run: not others(run.settings, wanted))
    settings = runs[0].settings
    return Measured(
        score=group.score,
        value=group.value,
        ci95=group.ci95,
        ci95_over=group.interval,
        seeds=tuple(run.seed for run in group.runs),
        test_tasks=group.figures[0].episodes,
        task_sets=tuple(figures.task_set for figures in group.figures),
        train_seconds=group.seconds,
        device=group.device,
        code=tuple(sorted({run.code for run in group.runs})),
        settings={key: settings[key] for key in sorted(settings) if key not in IGNORED},
    )


def others(settings: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, ...]:
    """Settings that are not the wanted ones, as "key=value", in order; free ones do not count."""
    return tuple(
        f"{key}={value}"
        for key, value in sorted(settings.items())
        if key not in IGNORED and (key not in wanted or wanted[key] != value)
    )


def read_measured(path: Path) -> dict[tuple[str, str], Measured]:
    """The figures of a `results.json`, by row and budget.

    Raises:
        UntrustedError: it is no such file; says where.
    """
    found = {}
    for number, entry in enumerate(json_list(path), 1):
        try:
            name = entry["row"], entry["budget"]
            if "value" in entry:
                found[name] = _of_json(entry)
        except KeyError as error:
            raise UntrustedError(f"{path.name}, entry {number}: {error} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise UntrustedError(f"{path.name}, entry {number}: {error}") from error
    return found


def as_entry(measured: Measured) -> dict[str, Any]:
    """A figure as it stands in `results.json`; `read_measured` reads it back."""
    return asdict(measured) | {"meta_steps": measured.meta_steps}


def _of_json(entry: dict[str, Any]) -> Measured:
    settings = entry["settings"]
    if not isinstance(settings, dict) or not isinstance(settings.get("trainer.steps"), int):
        raise TypeError("settings are no mapping with trainer.steps")
    return Measured(
        score=str(entry["score"]),
        value=finite(entry["value"]),
        ci95=None if entry["ci95"] is None else finite(entry["ci95"]),
        ci95_over=str(entry["ci95_over"]),
        seeds=_each(entry["seeds"], int),
        test_tasks=int(finite(entry["test_tasks"])),
        task_sets=tuple(None if name is None else str(name) for name in entry["task_sets"]),
        train_seconds=finite(entry["train_seconds"]),
        device=str(entry["device"]),
        code=_each(entry["code"], str),
        settings=settings,
    )


def _each(values: Any, kind: type[_T]) -> tuple[_T, ...]:
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise TypeError(f"{values!r} is no list of {kind.__name__}")
    return tuple(values)
