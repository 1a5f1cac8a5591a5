"""The rows of `metarun.inference.sensitivity` as a table, and the words around it."""

from collections.abc import Sequence
from typing import Any

from metarun.config.shape import shape_of, shots, ways
from metarun.inference.sensitivity import ORDERS, TASKS, Evaluated, Row
from metarun.reporting import table
from metarun.reporting.table import Cell, signed, with_interval

HEADER = ["protocol", "score", "difference", "its 95 % interval"]


def told(run: Evaluated) -> str:
    """The first row's protocol in words."""
    base, task = run.base, shape_of(run.base.config.task)
    shape = f"{shots(task)}, {task['query']} queries"
    if base.source.kind == "classification":
        shape = f"{ways(task)} {shots(task)}, {task['query']} queries a class"
    steps = vars(base.config.algo).get("eval_inner_steps")
    inner = "" if steps is None else f", {steps} inner step{'s' * (steps != 1)}"
    precision = base.config.engine.precision
    computed = "" if precision == "float32" else f", computed in {precision}"
    return (
        f"{base.config.algo.name} on {base.config.data.name}, {run.config.split} tasks, {shape}"
        f"{inner}, batch norm: {base.batch_norm}{computed}, seed "
        f"{base.config.seed}"
    )


def as_text(run: Evaluated, rows: Sequence[Row]) -> list[str]:
    """What a person reads on a terminal."""
    return [*table.as_lines(HEADER, _cells(run, rows), len(rows)), *_notes(run, rows)]


MARK = "<!-- written by metarun sensitivity -->"


def as_markdown(run: Evaluated, rows: Sequence[Row]) -> list[str]:
    """The same in Markdown."""
    notes = [table.markdown_text(note) for note in _notes(run, rows)]
    where = f"{run.path}: {told(run)}; after meta-step {run.content['step']}."
    lines = table.as_markdown(HEADER, _cells(run, rows))
    return [
        MARK,
        "",
        table.markdown_text(where),
        "",
        *lines,
        *(line for note in notes for line in ("", note)),
    ]


def _cells(run: Evaluated, rows: Sequence[Row]) -> list[list[Cell]]:
    name = run.base.objective.score_name
    return [[Cell(text, text) for text in _row(name, row)] for row in rows]


def _row(name: str, row: Row) -> list[str]:
    protocol = ", ".join(_in_words(key, value) for key, value in row.changes.items())
    if row.reason:
        return [protocol, "impossible", "", row.reason]
    score = with_interval(name, row.score, row.ci95)
    if not row.changes:
        return ["as the run was tested", score, "", ""]
    if TASKS in row.changes:
        return [protocol, score, "", ""]
    apart = signed(name, row.difference, row.difference_ci95)
    return [protocol, score, apart, "paired, over tasks" if row.paired else "of both, other tasks"]


def _in_words(key: str, value: Any) -> str:
    if key == ORDERS:
        return "another order of the classes" if value == 1 else f"{value} orders of the classes"
    if key == TASKS:
        return f"the first {value:,} tasks alone"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _notes(run: Evaluated, rows: Sequence[Row]) -> list[str]:
    found = [f"{rows[0].tasks:,} tasks a row; a difference is from the first row."]
    spread = next((row.spread for row in rows if row.spread == row.spread), None)
    if spread is not None:
        name = run.base.objective.score_name
        text = f"{100 * spread:.2f} points" if name == "accuracy" else f"{spread:.3g}"
        found.append(
            "From one order of its classes to another, the score of a task has a standard "
            f"deviation of {text}."
        )
    return found
