"""The confusion matrix as a picture."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from metarun.errors import printable_name
from metarun.inference.confusion import Confusion
from metarun.reporting.plots import SETTINGS
from metarun.system.files import write_atomically

MOST = 60  # classes whose names can be read
LETTERS = 24  # of a name


def confusion_matrix(found: Confusion) -> Figure:
    """How many of 100 queries of each class are taken for each, where both are in a task.

    Of more than `MOST` classes those are shown that are wrong most often.
    """
    wrong = (found.counts.sum(1) - found.counts.diagonal()).tolist()
    chosen = sorted(sorted(range(len(wrong)), key=lambda c: -wrong[c])[:MOST])
    counts, met = (part[chosen][:, chosen].double().numpy() for part in (found.counts, found.met))
    with np.errstate(invalid="ignore"):
        rates = 100 * counts / met  # NaN where two classes were never in one task
    names = [_short(found.names[c]) for c in chosen]
    side = 2.5 + 0.24 * len(chosen)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.add_subplot(xlabel="taken for", ylabel="class")
        axes.grid(visible=False)  # its lines would go through the numbers
        image = axes.imshow(rates, cmap="Blues", vmin=0, vmax=100)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        if len(names) <= 20:
            for (row, column), rate in np.ndenumerate(rates):
                if rate == rate:
                    color = "white" if rate > 50 else "black"
                    text = f"{rate:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=color, size=7)
        figure.colorbar(image, label="% of its queries, in tasks with both", shrink=0.8)
    return figure


def write_matrix(path: Path, found: Confusion) -> None:
    """Draw it into a PNG file.

    Raises:
        OSError: it cannot be written.
    """
    figure = confusion_matrix(found)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _short(name: str) -> str:
    """As much of a name as there is room for: its end, which tells classes of a group apart."""
    name = printable_name(name)
    return name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"
