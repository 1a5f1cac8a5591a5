"""The tables of a report: for people on a terminal, as Markdown, and as CSV for programs."""

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metarun.reporting.gather import Gathered
from metarun.reporting.groups import ALONE, Board, Group, differing
from metarun.reporting.labels import as_text, short_names

SHOWN = 20  # rows on the terminal


@dataclass(frozen=True)
class Cell:
    """One cell: what people read, and what it is sorted by."""

    text: str
    value: float | str

    @property
    def is_number(self) -> bool:
        """Whether it is sorted and aligned as a number."""
        return not isinstance(self.value, str)


def board_table(board: Board) -> tuple[list[str], list[list[Cell]]]:
    """The header and one row a group: settings that differ, scores, cost."""
    columns = _columns(board.groups, board.columns)
    names = short_names(columns)
    devices = {figures.device for group in board.groups for figures in group.figures}
    several_devices = len(devices) > 1
    header = [
        *(names[key] for key in columns),
        f"test {board.score}",
        "95 % CI over",
        f"best val {board.score}",
        "training",
        "meta-steps/s",
        "peak memory",
        *(["device"] if several_devices else []),
    ]
    rows = []
    for group in board.groups:
        speed = group.steps_per_second
        rows.append(
            [
                *(_setting(group.settings[k]) if k in group.settings else NONE for k in columns),
                Cell(with_interval(group.score, group.value, group.ci95), group.value),
                Cell(group.interval, group.interval),
                Cell(score_text(group.score, group.validation), group.validation),
                Cell(duration(group.seconds), group.seconds),
                Cell("–", -1.0) if speed is None else Cell(f"{speed:.3g}", speed),
                Cell(f"{group.memory_gib:.2f} GiB", group.memory_gib),
                *([Cell(group.device, group.device)] if several_devices else []),
            ]
        )
    return header, rows


NONE = Cell("–", "")


def unfinished_table(found: Gathered) -> tuple[list[str], list[list[Cell]]]:
    """The header and one row for each run that has no result: failed ones first."""
    header = ["run", "status", "meta-steps", "error"]
    entries = [
        (str(run.directory), run.status, run.progress, run.error or "")
        for run in found.runs
        if run.test is None
    ]
    entries += [(str(path), "failed", "0", error) for path, error in found.refused]
    entries.sort(key=lambda entry: (entry[1] != "failed", entry[1], entry[0]))
    return header, [[Cell(text, text) for text in entry] for entry in entries]


def numeric_columns(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    """Which columns have numbers, and are aligned to the right."""
    return [any(row[i].is_number for row in rows) for i in range(len(header))]


def as_lines(header: Sequence[str], rows: Sequence[Sequence[Cell]], most: int = SHOWN) -> list[str]:
    """A table in plain text; the first rows of it, so many at the most."""
    shown = rows[:most]
    widths = [
        max(len(name), *(len(row[i].text) for row in shown)) if shown else len(name)
        for i, name in enumerate(header)
    ]
    numeric = numeric_columns(header, rows)
    lines = []
    for texts in [list(header), *([cell.text for cell in row] for row in shown)]:
        aligned = zip(texts, widths, numeric, strict=True)
        lines.append("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in aligned))
    if len(rows) > len(shown):
        lines.append(f"… and {len(rows) - len(shown)} more, in report.md")
    return [line.rstrip() for line in lines]


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """A table in Markdown."""
    numeric = numeric_columns(header, rows)
    lines = [
        "| " + " | ".join(map(markdown_text, header)) + " |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    return lines + [
        "| " + " | ".join(markdown_text(cell.text) for cell in row) + " |" for row in rows
    ]


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = html.escape(text, quote=False)
    return "".join(f"\\{c}" if c in "\\|`*_[]#~" else c for c in escaped)


def groups_csv(boards: Sequence[Board]) -> str:
    """One line a group, numbers in full."""
    groups = [group for board in boards for group in board.groups]
    keys = _columns(groups, differing([group.settings for group in groups]))
    figures = [
        "score", "value", "ci95", "ci95_over", "seeds", "best_validation", "train_seconds",
        "meta_steps_per_s", "peak_memory_gib", "device",
    ]  # fmt: skip
    rows = [
        [
            *(_plain(group.settings.get(key)) for key in keys),
            group.score,
            group.value,
            group.ci95,
            "seeds" if len(group.runs) > 1 else f"{group.figures[0].unit}s",
            " ".join(str(run.seed) for run in group.runs),
            group.validation,
            group.seconds,
            group.steps_per_second,
            group.memory_gib,
            group.device,
        ]
        for group in groups
    ]
    return as_csv([*keys, *figures], rows)


def runs_csv(found: Gathered) -> str:
    """One line a run, finished or not."""
    keys = differing([run.settings for run in found.runs])
    header = [
        "directory", "status", "meta_steps", *keys, "score", "value", "ci95", "tasks",
        "best_validation", "train_seconds", "peak_memory_gib", "device", "task_set", "error",
    ]  # fmt: skip
    rows = []
    for run in found.runs:
        test = run.test
        figures: list[Any] = [None] * 9
        if test is not None:
            figures = [
                test.score, test.value, test.ci95, test.episodes, test.validation,
                test.train_seconds, test.peak_memory_gib, test.device, test.task_set,
            ]  # fmt: skip
        settings = [_plain(run.settings.get(key)) for key in keys]
        done = run.progress.partition("/")[0]
        rows.append([str(run.directory), run.status, done, *settings, *figures, run.error])
    for path, error in found.refused:
        rows.append([str(path), "failed", 0, *[None] * (len(keys) + 9), error])
    return as_csv(header, rows)


def with_interval(score: str, value: float, ci95: float | None) -> str:
    """A score with its confidence interval: "96.51 ± 0.38 %", "0.208 ± 0.054"."""
    if score == "accuracy":
        return f"{100 * value:.2f} ± {'?' if ci95 is None else f'{100 * ci95:.2f}'} %"
    return f"{value:.4g} ± {'?' if ci95 is None else f'{ci95:.2g}'}"


def one_signed(score: str, difference: float) -> str:
    """A difference alone: "+1.23 points" of accuracies, "-0.012" of errors."""
    return f"{100 * difference:+.2f} points" if score == "accuracy" else f"{difference:+.4g}"


def signed(score: str, difference: float, ci95: float) -> str:
    """A difference: "+1.23 ± 0.45 points" of accuracies, "-0.012 ± 0.004" of errors."""
    if score == "accuracy":
        return f"{100 * difference:+.2f} ± {100 * ci95:.2f} points"
    return f"{difference:+.4g} ± {ci95:.2g}"


def p_text(p: float) -> str:
    """The p of a test: "0.043"; "< 0.001", since no test here is exact further out."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def score_text(score: str, value: float) -> str:
    """A score alone."""
    return f"{100 * value:.2f} %" if score == "accuracy" else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def group_note(group: Group) -> str:
    """Which seeds a group has."""
    seeds = ", ".join(str(run.seed) for run in group.runs)
    return f"seed{'s' * (len(group.runs) > 1)} {seeds}"


def _columns(groups: Sequence[Group], differ: list[str]) -> list[str]:
    return differ or [key for key in ALONE if any(key in group.settings for group in groups)]


def _setting(value: Any) -> Cell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(as_text(value), float(value) if number else as_text(value))


def _plain(value: Any) -> str:
    return "" if value is None else as_text(value)


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for programs, in which no text is a formula to a spreadsheet."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([[_inert(cell) for cell in row] for row in (header, *rows)])
    return buffer.getvalue()


def _inert(cell: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
