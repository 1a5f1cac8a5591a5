"""The results as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind can tell apart; metarun's own are the blues
# and the yellow.
COLOURS = {
    "metarun": "#0072B2",
    "metarun-eager": "#56B4E9",
    "metarun-replay": "#A6CEE3",
    "metarun-checkpoint": "#F0E442",
    "metarun-inductor": "#003B5C",
    "vmap": "#999999",
    "vmap-compiled": "#000000",
    "higher": "#D55E00",
    "learn2learn": "#009E73",
    "torchopt": "#CC79A7",
    "plain": "#666666",
    "easyfsl": "#E69F00",
    "parallel-metalearn": "#882255",
}


def ratios(records: Sequence[Record], path: Path) -> None:
    """A bar for each implementation but the first of a case, whose time is 1."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["workload"] != "W7":  # no two do the same there
            groups.setdefault(_case(record), []).append(record)
    bars: list[tuple[float, Record]] = []
    ticks: dict[str, float] = {}
    place = 0.0
    for case, (_, *others) in groups.items():
        if not others:
            continue
        bars += [(place + i, record) for i, record in enumerate(others)]
        ticks[case] = place + (len(others) - 1) / 2
        place += len(others) + 1
    if not bars:
        return
    figure = Figure(figsize=(8.0, 1.6 + 0.18 * place), layout="constrained")
    axes = figure.subplots()
    present = {record["implementation"] for _, record in bars}
    for name in [*(name for name in COLOURS if name in present), *sorted(present - {*COLOURS})]:
        own = [(y, r) for y, r in bars if r["implementation"] == name]
        found = [r["ratio"] for _, r in own]
        below = [r["ratio"] - r["ratio_min"] for _, r in own]
        above = [r["ratio_max"] - r["ratio"] for _, r in own]
        axes.barh(
            [y for y, _ in own],
            [ratio - 1 for ratio in found],
            0.85,
            left=1,
            color=COLOURS.get(name),  # a folder may hold what an older version measured
            label=name,
        )
        axes.errorbar(
            found,
            [y for y, _ in own],
            xerr=[below, above],
            fmt="none",
            color="black",
            linewidth=0.8,
        )
    for y, record in bars:
        most = max(record["ratio_max"], 1.0)
        axes.annotate(
            f"{record['ratio']:.2f}", (most, y), (4, 0), textcoords="offset points", va="center",
            fontsize=7,
        )  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_yticks([*ticks.values()], [*ticks])
    axes.set_ylim(place - 1, -1)
    axes.set_xlabel(
        "time as a multiple of metarun's: median over rounds, least and most of a round"
    )
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
            axes.plot(*zip(*known, strict=True), marker="o", color=COLOURS.get(name), label=name)
    memory.set(xlabel="inner steps", ylabel="peak memory, MiB", ylim=(0, None))
    time.set(xlabel="inner steps", ylabel="a meta-step, s (median)", ylim=(0, None))
    for axes in (memory, time):
        axes.grid(color="#E6E6E6")
    memory.legend(frameon=False, fontsize=8)
    figure.suptitle(records[0]["machine"], fontsize=9)
    figure.savefig(path, dpi=130)


def _case(record: Record) -> str:
    workload, steps = str(record["workload"]), record["inner_steps"]
    return workload if steps is None else f"{workload}, {steps} step{'s' * (steps != 1)}"
