"""The results as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart; metarun's own are the blues.
COLOURS = {
    "metarun": "#0072B2",
    "metarun-reverse": "#0072B2",
    "metarun-eager": "#56B4E9",
    "metarun-checkpoint": "#56B4E9",
    "metarun-inductor": "#003B5C",
    "vmap": "#999999",
    "vmap-compiled": "#000000",
    "higher": "#D55E00",
    "learn2learn": "#009E73",
    "torchopt": "#CC79A7",
}


def ratios(records: Sequence[Record], path: Path) -> None:
    """A bar for each implementation: its time as a multiple of the first one's of its case."""
    records = [record for record in records if record["workload"] != "W7"]  # no two alike there
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_case(record), []).append(record)
    if not groups:
        return
    places, ticks, place = [], {}, 0.0
    for name, group in groups.items():
        ticks[name] = place + (len(group) - 1) / 2
        places += [place + i for i in range(len(group))]
        place += len(group) + 1
    figure = Figure(figsize=(8.0, 1.4 + 0.17 * place), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(record["implementation"] for record in records):
        own = [(y, r) for y, r in zip(places, records, strict=True) if r["implementation"] == name]
        values = [r["ratio"] for _, r in own]
        spread = [
            [r["ratio"] - r["ratio_min"] for _, r in own],
            [r["ratio_max"] - r["ratio"] for _, r in own],
        ]
        axes.barh(
            [y for y, _ in own], values, 0.85, xerr=spread, color=COLOURS[name], label=name,
            error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks([*ticks.values()], [*ticks])
    axes.set_ylim(place - 1, -1)
    axes.set_xlabel("time, as a multiple of metarun's (median; lines: least and most of a round)")
    axes.grid(axis="x", which="both", color="#E6E6E6")
    axes.set_axisbelow(True)
    axes.set_title(records[0]["machine"], fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def inner_steps(records: Sequence[Record], path: Path) -> None:
    """W6: peak memory and time against the number of inner steps."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for name in dict.fromkeys(record["implementation"] for record in records):
        own = [record for record in records if record["implementation"] == name]
        for axes, key in ((memory, "peak_mib"), (time, "median_s")):
            known = [(r["inner_steps"], r[key]) for r in own if r[key] is not None]
            axes.plot(*zip(*known, strict=True), marker="o", color=COLOURS[name], label=name)
    memory.set(xlabel="inner steps", ylabel="peak memory, MiB", ylim=(0, None))
    time.set(xlabel="inner steps", ylabel="a meta-step, s (median)", ylim=(0, None))
    for axes in (memory, time):
        axes.grid(color="#E6E6E6")
    memory.legend(frameon=False, fontsize=8)
    figure.suptitle(records[0]["machine"], fontsize=9)
    figure.savefig(path, dpi=130)


def _case(record: Record) -> str:
    workload, steps = str(record["workload"]), record["inner_steps"]
    return workload if steps is None else f"{workload}, {steps} steps"
