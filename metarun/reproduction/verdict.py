"""How far a measured figure is from a published one, by both intervals."""

import math
from statistics import NormalDist
from typing import Literal, NamedTuple

from metarun.reporting.table import p_text
from metarun.reproduction.rows import Published

_DEVIATIONS = NormalDist().inv_cdf(0.975)  # of half a 95 % interval


class Verdict(NamedTuple):
    """Where a measured figure is.

    Attributes:
        place: "inside" the published interval, ends included, else "above" or "below" it; where
            none was published, above or below the figure.
        difference: measured − published.
        ci95: half-width of the 95 % interval of the difference; None if no interval is known.
        p: of the difference being 0, two-sided; None likewise.
    """

    place: Literal["inside", "above", "below"]
    difference: float
    ci95: float | None
    p: float | None


def verdict(published: Published, value: float, ci95: float | None) -> Verdict:
    """Compare a measured figure m ± a with a published one f ± b.

    The difference m − f has the interval ± √(a² + b²): the two were measured on tasks and with
    seeds of their own. Its p is that of a normal distribution whose deviation is √(a² + b²) / 1.96.
    Where no interval was published, b is 0: the published figure then counts as exact, which makes
    a difference look more certain than it is.

    Args:
        published: the figure of the source.
        value: the measured one, in the same unit.
        ci95: half-width of its 95 % interval; None or 0 if it has none.
    """
    difference = value - published.value
    place: Literal["inside", "above", "below"] = "above" if difference > 0 else "below"
    # A rounded figure at the very end is inside.
    if abs(difference) <= (published.ci95 or 0.0) + 1e-12:
        place = "inside"
    # A half-width of 0 says that all tasks, or seeds, were alike, not that the figure is exact.
    known = [half for half in (ci95, published.ci95) if half and math.isfinite(half)]
    if not known:
        return Verdict(place, difference, None, None)
    half = math.hypot(*known)
    # erfc is exact far out, where 1 − Φ would be 0.
    p = math.erfc(abs(difference) / half * _DEVIATIONS / math.sqrt(2))
    return Verdict(place, difference, half, p)


def in_words(found: Verdict, score: str) -> str:
    """A verdict as people read it: "below by 0.80 ± 0.45 points (p < 0.001)", "inside, +0.10 …"."""
    if score == "accuracy":
        size, unit = f"{100 * abs(found.difference):.2f}", " points"
        half = None if found.ci95 is None else f"{100 * found.ci95:.2f}"
    else:
        size, unit = f"{abs(found.difference):.3g}", ""
        half = None if found.ci95 is None else f"{found.ci95:.2g}"
    interval = "" if half is None else f" ± {half}"
    p = "" if found.p is None else f" (p {p_text(found.p)})"
    if found.place == "inside":
        sign = "+" if found.difference >= 0 else "−"
        return f"inside, {sign}{size}{interval}{unit}{p}"
    return f"{found.place} by {size}{interval}{unit}{p}"
