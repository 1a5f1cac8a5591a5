"""Calibrated evaluations in a report: a table, and their reliability diagrams in one."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metarun.reporting.evaluations import Calibrated
from metarun.reporting.labels import unique
from metarun.reporting.plots import COLOURS, SETTINGS, TOP, Plot, as_svg
from metarun.reporting.table import Cell

NOTE = (
    "Of evaluations with calibrate=true: the temperature of validation tasks, the expected "
    "calibration error with and without it, and how often label sets hold the true label."
)


def calibration_table(found: Sequence[Calibrated]) -> tuple[list[str], list[list[Cell]]]:
    """The header and one row for each evaluation, the least error first."""
    header = [
        "evaluation", "of", "tasks", "temperature", "ECE", "ECE without", "sets for", "cover",
        "labels a set",
    ]  # fmt: skip
    rows = []
    for own in found:
        percents = (own.ece, own.ece_before, own.coverage, own.measured_coverage)
        rows.append(
            [
                Cell(str(own.directory), str(own.directory)),
                Cell(own.checkpoint, own.checkpoint),
                Cell(f"{own.tasks} {own.split}", float(own.tasks)),
                Cell(f"{own.temperature:.3g}", own.temperature),
                *(Cell(f"{100 * value:.1f} %", value) for value in percents),
                Cell(f"{own.labels_in_a_set:.2f}", own.labels_in_a_set),
            ]
        )
    return header, rows


def reliability_plot(found: Sequence[Calibrated]) -> Plot | None:
    """How often predictions of each confidence are right, of each evaluation."""
    if not found:
        return None
    shown = found[:TOP]
    names = unique([own.directory.name[:60] for own in shown])
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5.0, 4.6 + 0.17 * len(shown)), layout="constrained")
        axes = reliability_axes(figure)
        for own, name, color in zip(shown, names, COLOURS, strict=False):
            draw_reliability(axes, own.bins_before, color, None, "--")
            draw_reliability(axes, own.bins, color, f"{name} (error {own.ece:.1%})")
        figure.legend(loc="outside lower center")
        svg = as_svg(figure)
    some = f" The first {TOP} of {len(found)}." if len(found) > TOP else ""
    caption = (
        "Accuracy against confidence: calibrated as lines, the network's own dashed. The larger a "
        f"point is, the more predictions it stands for.{some}"
    )
    return Plot("Reliability", caption, svg)


def reliability_axes(figure: Figure) -> Axes:
    """Axes for `draw_reliability`, with the line on which confidence is accuracy."""
    axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    return axes


def draw_reliability(
    axes: Axes,
    bins: Sequence[Mapping[str, Any]],
    color: str,
    label: str | None,
    line: str = "-",
) -> None:
    """Draw the bins that have predictions: "confidence", "accuracy", "predictions" of each."""
    filled = [one for one in bins if one["predictions"]]
    most = max((one["predictions"] for one in filled), default=1)
    x, y = ([one[key] for one in filled] for key in ("confidence", "accuracy"))
    axes.plot(x, y, color=color, label=label, linestyle=line)
    axes.scatter(x, y, [60 * one["predictions"] / most for one in filled], color=color)
