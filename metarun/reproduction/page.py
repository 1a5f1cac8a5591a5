"""The results as lines on a terminal, as a Markdown page, and as JSON."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metarun.reporting.table import Cell, as_markdown, duration, score_text, with_interval
from metarun.reproduction.measured import as_entry
from metarun.reproduction.results import Result, ensemble_of
from metarun.reproduction.rows import FULL, Row
from metarun.reproduction.verdict import in_words

MARK = "<!-- written by metarun reproduce -->"
INTRODUCTION = f"""\
{MARK}

# Published figures, and ours

`metarun reproduce` wrote this page: no figure and no verdict was put in by hand. A row is *inside*
if our figure is within the published interval. Otherwise it is above or below by the difference,
given with the interval ± √(a² + b²) of both, and with the p of a difference of 0. An interval of
ours is over seeds, or over the test tasks of the only seed. Where the source gives no interval, its
figure counts as exact.
"""


def name_of(result: Result) -> str:
    """A row with its budget: whoever reads a line must see that it is a reduced one."""
    if result.budget == FULL:
        return result.row.name
    return f"{result.row.name} budget={result.budget}"


def line(result: Result) -> str:
    """A row on the terminal."""
    parts = [f"{name_of(result)}: published {published_text(result.row)}"]
    measured = result.measured
    if measured is None:
        return f"{parts[0]}; {result.state or 'not run'}"
    parts.append(f"ours {ours_text(result)}")
    parts.append(verdict_text(result))
    parts.append(f"trained in {duration(measured.train_seconds)} on {measured.device}")
    parts += [result.state] if result.state else []
    parts += [f"reduced: {', '.join(result.reduced)}"] if result.reduced else []
    return "; ".join(parts)


def published_text(row: Row) -> str:
    """The published figure with its interval and source; or that there is none."""
    found = row.published
    if found is None:
        return "no figure"
    figure = score_text(found.score, found.value)
    if found.ci95 is not None:
        figure = with_interval(found.score, found.value, found.ci95)
    over = f", {found.over}" if found.over else ""
    return f"{figure} ({found.source}{over})"


def ours_text(result: Result) -> str:
    """Our figure with its interval."""
    found = result.measured
    assert found is not None
    members = ensemble_of(result.row, result.budget)
    of = "" if members is None else f", {members} checkpoints together"
    return f"{with_interval(found.score, found.value, found.ci95)} ({found.ci95_over}{of})"


def verdict_text(result: Result) -> str:
    """The verdict, or why there is none."""
    if result.changed:
        return f"no verdict: run with {', '.join(result.changed)}"
    if result.verdict is None or result.row.published is None:
        return "no published figure"
    return in_words(result.verdict, result.row.published.score)


def page(results: Sequence[Result]) -> str:
    """The Markdown page of all rows: data sets with a figure of ours come first."""
    by_data: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_data[result.row.data_title].append(result)
    rows = {result.row.name for result in results}
    measured = {result.row.name for result in results if result.measured is not None}
    parts = [INTRODUCTION, f"{len(measured)} of {len(rows)} rows have a figure of ours."]
    for data, own in sorted(by_data.items(), key=lambda part: not any(r.measured for r in part[1])):
        parts += [f"\n## {data}\n", *_table(own), *_notes(own)]
    return "\n".join(parts) + "\n"


def _table(results: Sequence[Result]) -> list[str]:
    header = ["row", "published", "ours", "verdict", "meta-steps", "training, device"]
    cells = []
    for result in results:
        found = result.measured
        texts = [name_of(result), published_text(result.row), result.state or "not run", "", "", ""]
        if found is not None:
            ours = ours_text(result) + (f"; {result.state}" if result.state else "")
            cost = f"{duration(found.train_seconds)}, {found.device}"
            texts[2:] = [ours, verdict_text(result), f"{found.meta_steps:,}", cost]
        cells.append([Cell(text, text) for text in texts])
    return as_markdown(header, cells)


def _notes(results: Sequence[Result]) -> list[str]:
    """What is otherwise than in the source: each difference once, with its rows."""
    found: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for text in result.row.differences:  # of each budget
            if result.row.name not in found[text]:
                found[text].append(result.row.name)
        for text in result.reduced:
            found[text].append(name_of(result))
    if not found:
        return []
    return [
        "\nOtherwise than in the source:\n",
        *(f"- {text} ({', '.join(names)})" for text, names in found.items()),
    ]


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The same with numbers in full; rows that were not run have a state alone."""
    found = []
    for result in results:
        row = result.row
        entry: dict[str, Any] = {"row": row.name, "budget": result.budget, "state": result.state}
        entry["published"] = None if row.published is None else asdict(row.published)
        if result.measured is not None:
            entry |= as_entry(result.measured)
            entry |= {
                "changed": list(result.changed),
                "reduced": list(result.reduced),
                "verdict": None if result.verdict is None else result.verdict._asdict(),
            }
        found.append(entry)
    return found
