"""The confidence interval that results are written with."""

import math
from collections.abc import Sequence
from statistics import stdev

from scipy.special import stdtrit


def half_width95(deviation: float, count: int, sources: int = 1) -> float:
    """Half-width of the 95 % confidence interval of a mean: t·s/√n, with Student's t.

    Args:
        deviation: the standard deviation s of independent values, by n - 1.
        count: how many values n there are.
        sources: that they come from in turn; the deviation is then that within them
            (`deviation_within`), and t has n - sources degrees of freedom.

    Returns:
        The half-width; NaN for fewer than two values, which have no spread.
    """
    if count < 2:
        return math.nan
    return float(stdtrit(freedom(count, sources), 0.975)) * deviation / math.sqrt(count)


def freedom(count: int, sources: int = 1) -> int:
    """Degrees of freedom of `deviation_within` of so many values."""
    return count - (sources if sources * 2 <= count else 1)


def deviation_within(values: Sequence[float], sources: int = 1) -> float:
    """The standard deviation that the interval of a mean is made of.

    Where values come from several sources in turn, each source has its share of them, and what
    sets the sources apart is no chance. With nₖ values of deviation sₖ from source k,
    s² = Σₖ nₖ·sₖ² / n (Cochran 1977, Sampling techniques, section 5.6).

    Args:
        values: two at least; value i is of source i modulo their number.
        sources: how many; of fewer than two values each, they count as one.
    """
    if sources == 1 or sources * 2 > len(values):
        return stdev(values)
    parts = [values[place::sources] for place in range(sources)]
    return math.sqrt(sum(len(part) * stdev(part) ** 2 for part in parts) / len(values))
