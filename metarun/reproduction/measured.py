"""A measured figure of a row: taken from its runs, or from a file that has it from elsewhere."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from metarun.config.run import NEUTRAL_KEYS, OLDER
from metarun.reporting.groups import LOGGED, Group
from metarun.reporting.reading import LIMIT, clean, finite
from metarun.reproduction.rows import Row, rows
from metarun.system.untrusted import UntrustedError, json_list

_T = TypeVar("_T")

FREE = (
    *("seed", "device", *LOGGED),
    *(f"engine.{name}" for name in ("batching", "chunk", "compile", "cuda_graphs")),
)
"""Settings that are a matter of the machine, or of how often a row is run."""
INNER = "inner_opt."
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
        contents: which data they saw (`Figures.content`), each once; none where it is not known.
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
    contents: tuple[str, ...] = ()

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
        code=tuple(sorted({code for run in group.runs for code in run.codes})),
        settings={key: settings[key] for key in sorted(settings) if key not in IGNORED},
        contents=tuple(sorted({f.content for f in group.figures if f.content is not None})),
    )


def others(settings: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, ...]:
    """Settings that are not the wanted ones, as "key=value", in order; free ones do not count.

    One that is not there is as before there was such a setting. Where a run has no inner loop,
    those of an inner optimizer say nothing.
    """
    inner = any(key.startswith(INNER) for key in settings)
    found = []
    for key in sorted(settings.keys() | wanted.keys()):
        if key in IGNORED or (key.startswith(INNER) and not inner):
            continue
        value = settings.get(key, OLDER.get(key))
        if value != wanted.get(key, OLDER.get(key)):
            found.append(f"{key}={'null' if value is None else value}")
    return tuple(found)


def other_data(contents: Iterable[str], row: Row) -> tuple[str, ...]:
    """Data that are not the row's, in words."""
    found = sorted(set(contents) - set(row.contents)) if row.contents else []
    return tuple(f"other data ({content})" for content in found)


def read_measured(path: Path) -> dict[tuple[str, str], Measured]:
    """The figures of a `results.json`, by row and budget.

    Raises:
        UntrustedError: it is no such file; says where.
    """
    found: dict[tuple[str, str], Measured] = {}
    for number, entry in enumerate(json_list(path), 1):
        try:
            if not isinstance(entry, dict):
                raise TypeError("it is no object")
            row, budget = rows().get(entry["row"]), entry["budget"]
            if row is None or budget not in row.budgets:
                raise ValueError(f"there is no row {clean(str(entry['row']))!r} with such a budget")
            if (row.name, budget) in found:
                raise ValueError(f"{row.name} is there twice")
            if "value" in entry:
                found[row.name, budget] = _of_json(entry, row)
        except KeyError as error:
            raise UntrustedError(f"{path.name}, entry {number}: {error} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise UntrustedError(f"{path.name}, entry {number}: {error}") from error
    return found


def as_entry(measured: Measured) -> dict[str, Any]:
    """A figure as it stands in `results.json`; `read_measured` reads it back."""
    return asdict(measured) | {"meta_steps": measured.meta_steps}


def _of_json(entry: dict[str, Any], row: Row) -> Measured:
    settings = entry["settings"]
    if not isinstance(settings, dict) or type(settings.get("trainer.steps")) is not int:
        raise TypeError("settings are no mapping with trainer.steps")
    score = _text(entry["score"])
    if score != row.score:
        raise ValueError(f"score is {score!r}, and that of {row.name} is {row.score!r}")
    seeds = _each(entry["seeds"], int)
    if not seeds:
        raise ValueError("seeds are empty")
    names = entry["task_sets"]
    return Measured(
        score=score,
        value=_between("value", entry["value"], 1.0 if score == "accuracy" else LIMIT),
        ci95=None if entry["ci95"] is None else _between("ci95", entry["ci95"], LIMIT),
        ci95_over=_text(entry["ci95_over"]),
        seeds=seeds,
        test_tasks=int(_between("test_tasks", entry["test_tasks"], LIMIT)),
        task_sets=tuple(None if name is None else _text(name) for name in _each(names, object)),
        train_seconds=_between("train_seconds", entry["train_seconds"], LIMIT),
        device=_text(entry["device"]),
        code=tuple(map(_text, _each(entry["code"], str))),
        settings={clean(key): _tame(value) for key, value in settings.items()},
        contents=tuple(map(_text, _each(entry.get("contents", []), str))),
    )


def _between(name: str, value: Any, most: float) -> float:
    number = finite(value)
    if not 0 <= number <= most:
        raise ValueError(f"{name} is {number:g}")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{clean(repr(value))[:50]} is no text")
    return clean(value)


def _tame(value: Any) -> Any:
    return clean(value) if isinstance(value, str) else value


def _each(values: Any, kind: type[_T]) -> tuple[_T, ...]:
    known = isinstance(values, list) and all(isinstance(value, kind) for value in values)
    if not known or any(isinstance(value, bool) for value in values):
        raise TypeError(f"{clean(repr(values))[:50]} is no list of {kind.__name__}")
    return tuple(values)
