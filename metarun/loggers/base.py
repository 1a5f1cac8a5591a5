"""What a logger is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Record = Mapping[str, float | None]
"""Figures by tag ("train/loss", …); None stands for a number that is not finite."""


@dataclass(frozen=True)
class Logged:
    """The run that a logger is opened for.

    Attributes:
        directory: the run directory.
        start: meta-steps done before this attempt.
        settings: what the run was told, by dotted key; plain values.
        score: name of its score, "accuracy" or "mse".
    """

    directory: Path
    start: int
    settings: Mapping[str, Any]
    score: str


class Logger(Protocol):
    """A place for figures. One is opened for each attempt at a run."""

    def repeat(self, step: int, values: Record) -> None:
        """Figures of the meta-step that the attempt starts from; an earlier one logged them."""

    def metrics(self, step: int, values: Record) -> None:
        """Figures of a meta-step."""

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        """The figures of a finished run, and its curves over inner steps (from 0)."""

    def close(self, completed: bool) -> None:
        """The attempt is over; `completed` tells whether it ended as it should."""
