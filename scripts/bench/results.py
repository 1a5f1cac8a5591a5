"""The files of a benchmark: results.json, left_out.json, table.md and the plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plots, tables
from bench.workloads import Case

Record = dict[str, Any]


def add(
    folder: Path, case: Case, device: str, measured: Sequence[Record], left_out: Sequence[Record]
) -> None:
    """Put a case's records in the place of those that an earlier run left of it."""
    folder.mkdir(parents=True, exist_ok=True)
    this = (case.workload, case.inner_steps, device)
    for name, new in (("results.json", measured), ("left_out.json", left_out)):
        kept = [
            record
            for record in _read(folder / name)
            if (record["workload"], record["inner_steps"], record["device"]) != this
        ]
        records = sorted([*kept, *new], key=_order)
        (folder / name).write_text(json.dumps(records, indent=1) + "\n")


def present(folder: Path) -> None:
    """Write the table and the plots of all that the folder holds."""
    measured, left_out = _read(folder / "results.json"), _read(folder / "left_out.json")
    (folder / "table.md").write_text(tables.markdown(measured, left_out))
    for device in dict.fromkeys(record["device"] for record in measured):
        own = [record for record in measured if record["device"] == device]
        plots.ratios(own, folder / f"ratios-{device.replace(':', '-')}.png")
        if many := [record for record in own if record["workload"] == "W6"]:
            plots.inner_steps(many, folder / f"inner_steps-{device.replace(':', '-')}.png")


def _order(record: Record) -> tuple[str, int, str, int]:
    number, _, variant = record["workload"].removeprefix("W").partition("-")
    return record["device"], int(number), variant, record["inner_steps"] or 0


def _read(path: Path) -> list[Record]:
    found: list[Record] = json.loads(path.read_text()) if path.exists() else []
    return found
