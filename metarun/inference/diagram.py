"""The reliability diagram: how often predictions of each confidence are right."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from metarun.reporting.calibrations import draw_reliability, reliability_axes
from metarun.reporting.plots import COLOURS, SETTINGS
from metarun.system.files import write_atomically


def reliability_diagram(figures: dict[str, Any]) -> Figure:
    """Accuracy against confidence, with the temperature and without.

    Args:
        figures: those of `metarun.inference.calibrated.measured`.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        axes = reliability_axes(figure)
        for color, suffix, what in (
            (COLOURS[1], "_before", "the network's own"),
            (COLOURS[0], "", "calibrated"),
        ):
            label = f"{what} (error {figures[f'ece{suffix}']:.1%})"
            draw_reliability(axes, figures[f"reliability{suffix}"], color, label)
        axes.legend(loc="upper left")
    return figure


def write_diagram(path: Path, figures: dict[str, Any]) -> None:
    """Draw it into a PNG file.

    Raises:
        OSError: it cannot be written.
    """
    figure = reliability_diagram(figures)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
