"""The reliability diagram: how often predictions of each confidence are right."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from metarun.reporting.plots import COLOURS, SETTINGS
from metarun.system.files import write_atomically


def reliability_diagram(figures: dict[str, Any]) -> Figure:
    """Accuracy against confidence, with the temperature and without.

    Args:
        figures: those of `metarun.inference.calibrated.measured`.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
        for color, suffix, what in (
            (COLOURS[1], "_before", "the network's own"),
            (COLOURS[0], "", "calibrated"),
        ):
            bins = [one for one in figures[f"reliability{suffix}"] if one["predictions"]]
            most = max(one["predictions"] for one in bins)
            x, y = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
            axes.plot(x, y, color=color, label=f"{what} (error {figures[f'ece{suffix}']:.1%})")
            # The larger a point is, the more predictions it stands for.
            axes.scatter(x, y, [60 * one["predictions"] / most for one in bins], color=color)
        axes.legend(loc="upper left")
    return figure


def write_diagram(path: Path, figures: dict[str, Any]) -> None:
    """Draw it into a PNG file.

    Raises:
        OSError: it cannot be written.
    """
    figure = reliability_diagram(figures)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
