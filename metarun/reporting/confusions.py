"""Classes that evaluations of a report have confused: the hardest ones, in a table."""

from collections.abc import Sequence

from metarun.reporting.evaluations import Confused
from metarun.reporting.table import Cell

MOST = 40  # classes of an evaluation
NOTE = (
    f"Of evaluations with confusion=true: up to {MOST} classes of each, the hardest first, and "
    "what each was taken for most often, of its queries in tasks with both. All pairs are in the "
    "evaluation’s confusion.csv."
)


def confusion_table(found: Sequence[Confused]) -> tuple[list[str], list[list[Cell]]]:
    """The header and one row for each class of each evaluation."""
    header = ["evaluation", "of", "split", "class", "queries", "accuracy", "taken for", "how often"]
    rows = []
    for own in found:
        for one in own.classes[:MOST]:
            rate = one.mistaken / one.of if one.of else 0.0
            often = f"{100 * rate:.1f} % of {one.of}" if one.taken_for is not None else "–"
            rows.append(
                [
                    Cell(str(own.directory), str(own.directory)),
                    Cell(own.checkpoint, own.checkpoint),
                    Cell(own.split, own.split),
                    Cell(one.name, one.name),
                    Cell(str(one.queries), float(one.queries)),
                    Cell(f"{100 * one.accuracy:.1f} %", one.accuracy),
                    Cell(one.taken_for or "–", one.taken_for or ""),
                    Cell(often, rate),
                ]
            )
    return header, rows
