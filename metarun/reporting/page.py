"""The HTML page of a report: one file that needs no network and runs no script but its own.

All text is escaped by Jinja, pictures are images (whose scripts browsers do not run), and a
content security policy allows nothing else.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from metarun import __version__
from metarun.reporting.gather import Gathered
from metarun.reporting.groups import Board, as_text
from metarun.reporting.plots import Plot
from metarun.reporting.table import Cell, board_table, group_note, numeric_columns


@dataclass(frozen=True)
class Section:
    """A board as the page shows it."""

    board: Board
    plots: list[Plot]

    @property
    def table(self) -> tuple[list[str], list[list[Cell]]]:
        """Header and rows."""
        return board_table(self.board)

    @property
    def notes(self) -> list[str]:
        """For each row, the seeds of its group."""
        return [group_note(group) for group in self.board.groups]

    @property
    def shared(self) -> list[tuple[str, str]]:
        """The settings that all groups of the board share."""
        first, *others = (group.settings for group in self.board.groups)
        missing = object()
        return [
            (key, as_text(value))
            for key, value in first.items()
            if all(config.get(key, missing) == value for config in others)
        ]


def render(
    title: str,
    counts: str,
    sections: Sequence[Section],
    unfinished: tuple[list[str], list[list[Cell]]],
    found: Gathered,
    notes: Sequence[str],
) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("metarun.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.globals["numeric_columns"] = numeric_columns
    script = files("metarun.reporting").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values: dict[str, Any] = {
        "title": title,
        "counts": counts,
        "sections": sections,
        "unfinished": unfinished,
        "skipped": found.skipped,
        "notes": notes,
        "script": script,
        "script_digest": digest,
        "version": __version__,
    }
    return environment.get_template("page.html").render(values)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
