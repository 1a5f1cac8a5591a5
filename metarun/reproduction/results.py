"""What was measured of each row: its runs, read and compared with what the row asks for."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from metarun.config.compose import composed
from metarun.config.run import flat, without_nothing
from metarun.reporting.gather import Run, read_run
from metarun.reporting.groups import Group
from metarun.reporting.reading import finite
from metarun.reproduction.measured import FREE, Measured, of_group, other_data, others
from metarun.reproduction.rows import FULL, Row, experiment
from metarun.reproduction.verdict import Verdict, verdict
from metarun.system.untrusted import json_object


class Result(NamedTuple):
    """A row with one budget, and what became of it.

    Attributes:
        measured: the figure of its completed runs; None if there are none.
        state: in words, of what is not completed: "" if all is.
        changed: what of the runs is not the row's: settings, as "key=value", and data; no verdict
            then.
        reduced: settings that the budget changes, as "key=value in place of …", but for those that
            are changed again.
        verdict: None without a published figure, without runs, or if something is changed.
    """

    row: Row
    budget: str
    measured: Measured | None
    state: str
    changed: tuple[str, ...]
    reduced: tuple[str, ...]
    verdict: Verdict | None


def folder_of(out: Path, row: Row, budget: str) -> Path:
    """Where a row's runs are, each in a folder `s<seed>`."""
    return out / experiment(row, budget)


def result_of(
    out: Path, row: Row, budget: str, known: Mapping[tuple[str, str], Measured] | None = None
) -> Result:
    """Read the runs of a row.

    Args:
        out: the folder of all rows.
        known: figures from elsewhere, by row and budget. Runs that are here take the place of one
            if all of them are complete, with the settings of the row and no fewer seeds.
    """
    together = ensemble_of(row, budget) is not None
    runs, states = _read(folder_of(out, row, budget), together)
    measured = (known or {}).get((row.name, budget))
    if not runs and not states and measured is None:
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
    changed: tuple[str, ...] = ()
    here = tuple(sorted({text for run in runs for text in others(run.settings, wanted)}))
    here += other_data({run.test.content for run in runs if run.test and run.test.content}, row)
    if runs and (measured is None or not _lesser(runs, states, here, measured)):
        measured, changed = of_group(_grouped(row, runs), wanted), here
    elif measured is not None:
        changed = others(measured.settings, wanted) + other_data(measured.contents, row)
        if runs:
            states.append(f"runs that are here do not count: {_why(states, here)}")
    # What a run was given otherwise is said once, by its own value.
    given = {text.partition("=")[0] for text in changed}
    reduced = tuple(text for text in reduced if text.partition("=")[0] not in given)
    found = None
    if measured is not None and row.published is not None and not changed:
        found = verdict(row.published, measured.value, measured.ci95)
    return Result(row, budget, measured, "; ".join(states), changed, reduced, found)


def _lesser(runs: list[Run], states: list[str], changed: tuple[str, ...], known: Measured) -> bool:
    """Whether runs give less of a figure than one that is known."""
    return bool(states or changed) or len(runs) < len(known.seeds)


def _why(states: list[str], changed: tuple[str, ...]) -> str:
    if changed:
        return f"run with {', '.join(changed)}"
    return "some are not complete" if states else "fewer seeds"


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
        if not path.is_dir() or not path.name[1:].isdigit():  # a copy, say
            continue
        try:
            run = _of_ensemble(read_run(path)) if together else read_run(path)
            if run.seed != int(path.name[1:]):
                raise ValueError(f"it is a run with seed={run.seed}")
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
    return without_nothing(flat(asdict(composed("train", [f"experiment={name}"]))))


def _grouped(row: Row, runs: list[Run]) -> Group:
    settings = {key: value for key, value in runs[0].settings.items() if key != "seed"}
    return Group(settings, runs, row.name, {})
