"""Reading files that may be damaged or hostile: within bounds, and as plain values."""

import json
import math
from pathlib import Path
from typing import Any

LIMIT = 2**63  # of settings and costs; a loss that diverges may be larger
LARGEST = 2**26  # bytes of a file that is read whole


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


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object; nothing if the file is not there.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is damaged") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is damaged")
    return value


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a file.

    Args:
        largest: its size at most, in bytes.

    Raises:
        ValueError: it is no file, too large, or no text.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        what = "is no file" if path.exists() else "is missing"
        raise ValueError(f"{path.name} {what}")
    if path.stat().st_size > largest:
        raise ValueError(f"{path.name} is larger than {largest // 2**10} KiB")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is damaged") from error
