"""The results as JSON and as a page."""

from pathlib import Path
from typing import Any


def write(results: list[dict[str, Any]], folder: Path) -> None:
    """`operations.json` and `operations.md`."""
