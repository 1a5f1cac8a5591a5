"""What a report says, whatever it is written as."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metarun.config.typed import as_argument
from metarun.errors import ConfigError
from metarun.reporting.calibrations import calibration_table, reliability_plot
from metarun.reporting.comparison import Comparison, compare, furthest_apart
from metarun.reporting.comparison_table import CSV_HEADER, comparison_table, csv_rows
from metarun.reporting.confusions import confusion_table
from metarun.reporting.gather import gather
from metarun.reporting.groups import Board, boards
from metarun.reporting.labels import as_text
from metarun.reporting.plots import Plot, plots
from metarun.reporting.table import (
    Cell,
    as_csv,
    board_table,
    group_note,
    groups_csv,
    one_signed,
    runs_csv,
    unfinished_table,
)

PLOTTED = 4  # boards with plots
LOOKED_AT = 3  # pairs of groups of a board whose tasks are named
APART = "Tasks on which runs differ most"
ORDER = (
    "Ordered by validation, so that test scores choose nothing. The interval after ± is a "
    "95 % confidence interval (Student’s t) over what its column says."
)


@dataclass(frozen=True)
class Section:
    """A board with its table and plots.

    Attributes:
        table: header and rows.
        pairs: header and rows of what its groups differ by; no rows where there is one group.
        seeds: for each row, the seeds of its group.
        shared: the settings that all groups of the board share.
    """

    board: Board
    plots: list[Plot]
    table: tuple[list[str], list[list[Cell]]]
    pairs: tuple[list[str], list[list[Cell]]]
    seeds: list[str]
    shared: list[tuple[str, str]]


@dataclass(frozen=True)
class Report:
    """All of a report.

    Attributes:
        counts: how many runs, and how they ended.
        unfinished: header and rows of the runs without a result.
        lists: what else there is to say: (heading, lines).
        calibrated: header and rows of the evaluations that were calibrated.
        reliability: their diagram, if there are any.
        confused: header and rows of classes of the evaluations that counted confusions.
    """

    title: str
    counts: str
    sections: list[Section]
    unfinished: tuple[list[str], list[list[Cell]]]
    lists: list[tuple[str, list[str]]]
    calibrated: tuple[list[str], list[list[Cell]]]
    reliability: Plot | None
    confused: tuple[list[str], list[list[Cell]]]


def report_on(roots: Sequence[str | Path]) -> tuple[Report, dict[str, str]]:
    """Gather runs and compare them.

    Returns:
        The report, and the tables for programs by file name.

    Raises:
        ConfigError: a directory is not there, or none holds a run.
    """
    found = gather(roots)
    if not found.runs and not (found.refused or found.calibrated or found.confused):
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in found.skipped[:10])
        where = ", ".join(map(str, roots))
        raise ConfigError(f"there are no runs of metarun in {where}{reasons}")
    compared, notes = boards(found.runs)
    pairs = [compare(board) for board in compared]
    if len(compared) > PLOTTED:
        notes.append(
            f"plots are drawn for the first {PLOTTED} of {len(compared)} comparisons: give "
            "fewer directories for the others"
        )
    statuses = Counter(run.status for run in found.runs)
    statuses["failed"] += len(found.refused)
    total = sum(statuses.values())
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items() if count)
    left_out = [f"{path}: {reason}" for path, reason in found.skipped]
    report = Report(
        title=f"Report on {', '.join(map(str, roots))}",
        counts=f"{total} run{'s' * (total != 1)}: {counts}",
        sections=[
            _section(board, pairs[index], index < PLOTTED) for index, board in enumerate(compared)
        ],
        unfinished=unfinished_table(found),
        lists=[
            (heading, lines)
            for heading, lines in (
                (APART, [line for found in pairs for line in _apart(found)]),
                ("Left out", left_out),
                ("To know", notes),
            )
            if lines
        ],
        calibrated=calibration_table(found.calibrated),
        reliability=reliability_plot(found.calibrated),
        confused=confusion_table(found.confused),
    )
    differences = [
        [board.title, *row]
        for board, found_pairs in zip(compared, pairs, strict=True)
        for row in csv_rows(board.score, found_pairs)
    ]
    return report, {
        "report.csv": groups_csv(compared),
        "report_runs.csv": runs_csv(found),
        "report_pairs.csv": as_csv(["tasks", *CSV_HEADER], differences),
    }


def _apart(pairs: Sequence[Comparison]) -> list[str]:
    """Which tasks of a board to look at, and how."""
    lines = []
    for pair in [p for p in pairs if p.difference and p.difference.tasks][:LOOKED_AT]:
        one, other, apart = furthest_apart(pair)
        if one.test is None or one.test.unit != "task" or not apart:
            continue
        pictures = one.test.score == "accuracy" and one.settings["data.name"] != "features"
        told = ", ".join(
            f"task {task} ({one_signed(one.test.score, value)})" for task, value in apart.items()
        )
        commands = " and ".join(
            f"metarun explain {as_argument('ckpt', run.directory)} episode={next(iter(apart))}"
            for run in (one, other)
            if pictures and (run.directory / "checkpoints").is_dir()  # a bundle has none
        )
        how = f": {commands}" if commands else ""
        lines.append(f"{pair.first.label} less {pair.second.label}, seed {one.seed}: {told}{how}")
    return lines


def _section(board: Board, pairs: list[Comparison], plotted: bool) -> Section:
    first, *others = (group.settings for group in board.groups)
    shared = [
        (key, as_text(value))
        for key, value in first.items()
        if all(key in config and config[key] == value for config in others)
    ]
    seeds = [group_note(group) for group in board.groups]
    drawn = plots(board) if plotted else []
    return Section(
        board, drawn, board_table(board), comparison_table(board.groups, pairs), seeds, shared
    )
