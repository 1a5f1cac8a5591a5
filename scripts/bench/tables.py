"""The results as tables in Markdown."""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

HEAD = (
    "| workload | inner steps | implementation | median | least – most | times the first "
    "| peak, MiB | warm-up, s |",
    "|---|---|---|---|---|---|---|---|",
)


def markdown(measured: Sequence[Record], left_out: Sequence[Record]) -> str:
    """A table for each device, what its workloads are, and who was left out and why."""
    parts = []
    for device in dict.fromkeys(r["device"] for r in [*measured, *left_out]):
        own = [record for record in measured if record["device"] == device]
        machines = ", ".join(dict.fromkeys(record["machine"] for record in own))
        parts += [f"### {machines or device}", ""]
        if own:
            parts += [*HEAD, *(_row(record) for record in own), ""]
        what = dict.fromkeys((record["workload"], record["what"]) for record in own)
        parts += [f"- {workload}: {words}" for workload, words in what]
        missing = dict.fromkeys(
            f"- left out of {record['workload']}: {record['implementation']} ({record['why']})"
            for record in left_out
            if record["device"] == device
        )
        parts += [*missing, ""]
    return "\n".join(parts)


def seconds(value: float) -> str:
    """Three digits and a unit: 1.23 ms."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            number = value * scale
            return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"
    raise AssertionError


def ratio(record: Record) -> str:
    """The median ratio and its spread over the rounds."""
    spread = "–".join(f"{record[key]:.2f}" for key in ("ratio_min", "ratio_max"))
    return f"{record['ratio']:.2f} ({spread})"


def _row(record: Record) -> str:
    steps, peak, warm = (record.get(key) for key in ("inner_steps", "peak_mib", "warmup_s"))
    cells = [
        record["workload"],
        "" if steps is None else str(steps),
        record["implementation"],
        seconds(record["median_s"]),
        f"{seconds(record['min_s'])} – {seconds(record['max_s'])}",
        ratio(record),
        "" if peak is None else f"{peak:.1f}",
        "" if warm is None else f"{warm:.1f}",
    ]
    return f"| {' | '.join(cells)} |"
