"""How a peer is imported, and what every peer gives."""

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

from metarun.episodes.source import Episodes

MetaGradient = Callable[[Episodes], None]
"""Of a meta-batch; leaves the gradient of the mean task loss in the parameters' `grad`."""


def imported(name: str) -> Any:
    """A peer's package.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # of the advice of what it needs
            return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"cannot be imported: {error}") from error
