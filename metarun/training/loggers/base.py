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
        settings: what the run was told, by dotted key; plain values.
        score: name of its score, "accuracy" or "mse".
    """

    directory: Path
    settings: Mapping[str, Any]
    score: str


class Logger(Protocol):
    """A place for figures. One is opened for each attempt at a run."""

    def repeat(self, log: Sequence[Mapping[str, Any]]) -> None:
        """What earlier attempts logged, but for what this one logs again; called once, first.

        Args:
            log: entries as in `metrics.jsonl`.
        """

    def metrics(self, step: int, values: Record) -> None:
        """Figures of a meta-step."""

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        """The figures of a finished run, and its curves over inner steps (from 0)."""

    def close(self, completed: bool) -> None:
        """The attempt is over; `completed` tells whether it ended as it should."""
