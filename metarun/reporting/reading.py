"""Values out of files that may be damaged or hostile: finite, within bounds, on one line."""

import math
from typing import Any

LIMIT = 2**63  # of settings and costs; a loss that diverges may be larger


def clean(text: str) -> str:
    """Text on one line without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def finite(value: Any) -> float:
    """A number as a float.

    Raises:
        ValueError: it is none, or is not finite.
    """
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{clean(repr(value))[:50]} is no finite number")
    return number


def bounded(value: Any) -> float:
    """A number below `LIMIT` in size, as a float.

    Raises:
        ValueError: it is not.
    """
    if abs(number := finite(value)) >= LIMIT:
        raise ValueError(f"{clean(repr(value))[:50]} is beyond all bounds")
    return number


def finite_or_nan(value: Any) -> float:
    """A number as a float, or NaN, which is written as null.

    Raises:
        ValueError: it is neither.
    """
    return math.nan if value is None else finite(value)
