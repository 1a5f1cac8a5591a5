"""The comparisons of a board as a table, in words that say what would decide what is open."""

from collections.abc import Sequence
from typing import Any

from metarun.reporting.comparison import (
    LEVEL,
    MOST,
    Comparison,
    tasks_to_decide,
    units_to_decide,
)
from metarun.reporting.groups import Group
from metarun.reporting.labels import setting_texts, short_names
from metarun.reporting.table import Cell, p_text, signed

NOTE = (
    "Differences on the test tasks that both have met, first minus second. The interval is a 95 % "
    "confidence interval (Student’s t); p is that of a paired t-test, corrected by Holm’s method "
    "for the comparisons of this table. Better on: units in which the first or the second was "
    "better, with the p of a sign test, uncorrected. To decide: how many seeds or tasks there "
    "would have to be in all, if the difference and its spread stay as they are."
)
CSV_HEADER = [
    "first", "second", "score", "difference", "ci95", "ci95_over", "units", "tasks_per_seed",
    "better", "worse", "sign_p", "p", "p_holm", "decided", "units_to_decide", "tasks_to_decide",
    "reason",
]  # fmt: skip


def comparison_table(
    groups: Sequence[Group], comparisons: Sequence[Comparison]
) -> tuple[list[str], list[list[Cell]]]:
    """The header and one row for each pair of groups, whose names are as short as they can be."""
    short = _short_labels(groups)
    header = ["first", "second", "difference", "95 % CI over", "better on", "p (Holm)", "to decide"]
    rows = []
    for one in comparisons:
        names = [Cell(short[g.label], short[g.label]) for g in (one.first, one.second)]
        if one.difference is None:
            rows.append([*names, *[Cell("–", "")] * 4, Cell(one.reason, one.reason)])
            continue
        found = one.difference
        text = signed(one.first.score, found.value, found.ci95)
        over = f"{found.count} {found.unit}s" + " of 1 seed" * (found.unit != "seed")
        wins = f"{found.better} : {found.worse} (p {p_text(found.sign_p)})"
        open_for = to_decide(one)
        rows.append(
            [
                *names,
                Cell(text, found.value),
                Cell(over, over),
                Cell(wins, found.better / max(1, found.better + found.worse)),
                Cell(p_text(one.p), one.p),
                Cell(open_for, open_for),
            ]
        )
    return header, rows


def _short_labels(groups: Sequence[Group]) -> dict[str, str]:
    """Each label -> as many of its first settings as tell all groups apart."""
    names = short_names(list(dict.fromkeys(key for group in groups for key in group.shown)))
    for count in range(1, len(names)):
        labels = [setting_texts(group.shown, names)[:count] for group in groups]
        if len({tuple(label) for label in labels}) == len(groups):
            return {g.label: ", ".join(label) for g, label in zip(groups, labels, strict=True)}
    return {group.label: group.label for group in groups}


def to_decide(one: Comparison) -> str:
    """What would tell the difference from 0, in words."""
    found = one.difference
    if found is None or one.decided:
        return "decided" if found is not None else one.reason
    if not found.value:
        return "no number: the means are equal"
    units = units_to_decide(found, min(one.level, LEVEL))
    if units is None:
        return f"more than {MOST:,} {found.unit}s"
    text = f"{units:,} {found.unit}s"
    if (tasks := tasks_to_decide(found, min(one.level, LEVEL))) is not None:
        text += f", or {tasks:,} tasks of each seed"
    return text


def csv_rows(score: str, comparisons: Sequence[Comparison]) -> list[list[Any]]:
    """One row for each pair, numbers in full; see `CSV_HEADER`."""
    rows = []
    for one in comparisons:
        found = one.difference
        row: list[Any] = [one.first.label, one.second.label, score]
        if found is None:
            rows.append([*row, *[None] * (len(CSV_HEADER) - 4), one.reason])
            continue
        level = min(one.level, LEVEL)
        row += [
            found.value, found.ci95, f"{found.unit}s", found.count, found.tasks, found.better,
            found.worse, found.sign_p, found.p, one.p, one.decided, units_to_decide(found, level),
            tasks_to_decide(found, level), None,
        ]  # fmt: skip
        rows.append(row)
    return rows
