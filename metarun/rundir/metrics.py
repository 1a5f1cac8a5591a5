"""metrics.jsonl: what a run has logged, one entry a line. Needs neither torch nor Hydra."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarun.system.files import write_text
from metarun.system.untrusted import read_regular

log = logging.getLogger(__name__)

MOST_BYTES = 2**30

ELAPSED = "time/elapsed_s"
"""Seconds that the run has taken up to an entry, in all attempts."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, each with an integer "step" and figures by tag,
    numbers or None; no entries if there is no file.

    Lines that are no such entry are left out with a warning: a crash may cut the last one
    short or leave zeros in its place.

    Raises:
        OSError: the file cannot be read, is no regular file or has more than `MOST_BYTES`.
    """
    try:
        content = read_regular(Path(path), MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    entries, bad = [], 0
    for line in content.splitlines():
        entry = _parsed(line)
        if entry is not None:
            entries.append(entry)
        elif line.strip():
            bad += 1
    if bad:
        lines = "a line that is no entry" if bad == 1 else f"{bad} lines that are no entries"
        log.warning("%s: left out %s", path, lines)
    return entries


def complete(
    log: list[dict[str, Any]], trainer: Mapping[str, Any], step: int, last_eval: int
) -> bool:
    """Whether a log has an entry of all that a run logs up to a checkpoint.

    Args:
        log: as `read_metrics` returns it.
        trainer: the run's `trainer.…` settings.
        step: meta-steps done at the checkpoint.
        last_eval: step of the last validation before it.
    """
    trained = {entry["step"] for entry in log if "optim/lr" in entry}
    validated = {entry["step"] for entry in log if "val/loss" in entry}
    return (
        _due(trainer["log_every"], trainer["steps"], step) <= trained
        and _due(trainer["eval_every"], trainer["steps"], last_eval) <= validated
    )


def _due(every: int, last: int, until: int) -> set[int]:
    """Multiples of a number of meta-steps, and the last meta-step of all, up to one."""
    return {*range(every, until + 1, every), *([last] if until == last else [])}


def cut_back(path: Path, step: int, last_eval: int) -> list[dict[str, Any]]:
    """Cut a metrics.jsonl back to what a checkpoint knows of, and return that.

    Args:
        step: meta-steps done at the checkpoint; what was logged later will be logged again.
        last_eval: step of the last validation that it knows of, likewise.
    """
    kept = [
        entry
        for entry in read_metrics(path)
        if entry["step"] <= step
        and not (entry["step"] > last_eval and any(tag.startswith("val/") for tag in entry))
    ]
    if path.exists():
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: not JSON, or not even UTF-8
        return None
    if not isinstance(entry, dict) or type(step := entry.get("step")) is not int:
        return None
    figures = all(value is None or type(value) in (int, float) for value in entry.values())
    return entry if figures and 0 <= step < 2**63 else None
