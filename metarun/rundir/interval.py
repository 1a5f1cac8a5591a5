"""The confidence interval that results are written with."""

import math

from scipy.special import stdtrit


def half_width95(deviation: float, count: int) -> float:
    """Half-width of the 95 % confidence interval of a mean: t·s/√n, with Student's t.

    Args:
        deviation: the standard deviation s of independent values, by n - 1.
        count: how many values n there are.

    Returns:
        The half-width; NaN for fewer than two values, which have no spread.
    """
    if count < 2:
        return math.nan
    return float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
