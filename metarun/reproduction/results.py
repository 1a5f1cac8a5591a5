"""What was measured of each row: its runs, read and compared with what the row asks for."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from metarun.config.compose import composed
from metarun.config.run import NEUTRAL_KEYS, flat
from metarun.reporting.gather import Run, read_run
from metarun.reporting.groups import LOGGED, Group
from metarun.reporting.reading import finite
from metarun.reproduction.rows import FULL, Row, experiment
from metarun.reproduction.verdict import Verdict, verdict
from metarun.system.untrusted import json_object

FREE = ("seed", "device", "engine.batching", "engine.chunk", "engine.compile", *LOGGED)
"""Settings that are a matter of the machine, or of how often a row is run."""


class Result(NamedTuple):
    """A row with one budget, and what became of it.

    Attributes:
        group: its completed runs, which differ in nothing but the seed; None if there are none.
        state: in words, of what is not completed: "" if all is.
        changed: settings of the runs that are not the row's, as "key=value"; no verdict then.
        reduced: settings that the budget changes, as "key=value in place of …".
        verdict: None without a published figure, without runs, or if settings are others.
    """

    row: Row
    budget: str
    group: Group | None
    state: str
    changed: tuple[str, ...]
    reduced: tuple[str, ...]
    verdict: Verdict | None


def folder_of(out: Path, row: Row, budget: str) -> Path:
    """Where a row's runs are, each in a folder `s<seed>`."""
    return out / experiment(row, budget)


def result_of(out: Path, row: Row, budget: str) -> Result:
    """Read the runs of a row.

    Args:
        out: the folder of all rows.
    """
    together = ensemble_of(row, budget) is not None
    runs, states = _read(folder_of(out, row, budget), together)
    if not runs and not states:
        return Result(row, budget, None, "not run", (), (), None)
    wanted = _settings(experiment(row, budget))
    reduced: tuple[str, ...] = ()
    if budget != FULL:
        whole = _settings(experiment(row, FULL))
        reduced = tuple(
            f"{key}={wanted.get(key)} in place of {whole.get(key)}"
            for key in sorted(wanted.keys() | whole.keys())
            if wanted.get(key) != whole.get(key) and key not in FREE
        )
    changed = tuple(sorted({text for run in runs for text in _changed(run, wanted)}))
    group = _grouped(row, runs) if runs else None
    found = None
    if group is not None and row.published is not None and not changed:
        if group.score != row.published.score:
            raise ValueError(f"{row.name}: its runs have {group.score} for a score")
        found = verdict(row.published, group.value, group.ci95)
    return Result(row, budget, group, "; ".join(states), changed, reduced, found)


def ensemble_of(row: Row, budget: str) -> int | None:
    """How many checkpoints the figure is of, where it is that of their mean outputs."""
    found: int | None = row.settings.get(budget, {}).get("trainer", {}).get("ensemble")
    return found


def _read(folder: Path, together: bool) -> tuple[list[Run], list[str]]:
    """The completed runs of a row, and the state of the others.

    Args:
        together: whether their figures are those of an ensemble of checkpoints.
    """
    runs, states = [], []
    for path in sorted(folder.glob("s*"), key=lambda path: (len(path.name), path.name)):
        if not path.is_dir():
            continue
        try:
            run = _of_ensemble(read_run(path)) if together else read_run(path)
        except (OSError, TypeError, ValueError) as error:
            states.append(f"{path.name} unreadable: {error}")
            continue
        if run.test is not None:
            runs.append(run)
        else:
            why = f": {run.error}" if run.error else ""
            states.append(f"{path.name} {run.status} at {run.progress}{why}")
    return runs, states


def _of_ensemble(run: Run) -> Run:
    """A run with the figures of its ensemble in place of those of its best checkpoint."""
    if run.test is None:
        return run
    found = json_object(run.directory / "result.json").get("ensemble")
    if not isinstance(found, dict):
        raise ValueError("result.json has no figures of an ensemble")
    value, ci95 = finite(found.get(run.test.score)), finite(found.get("ci95"))
    return replace(run, test=replace(run.test, value=value, ci95=ci95, by_task=()))


def _settings(name: str) -> dict[str, Any]:
    return flat(asdict(composed("train", [f"experiment={name}"])))


def _changed(run: Run, wanted: dict[str, Any]) -> Iterable[str]:
    for key, value in run.settings.items():
        if key in FREE or key in NEUTRAL_KEYS or key == "plugins":
            continue
        if key not in wanted or wanted[key] != value:
            yield f"{key}={value}"


def _grouped(row: Row, runs: list[Run]) -> Group:
    settings = {key: value for key, value in runs[0].settings.items() if key != "seed"}
    return Group(settings, runs, row.name, {})
