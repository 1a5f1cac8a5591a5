"""How a command's process begins and ends: sooner than Python would by itself."""

import atexit
import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator

_exit_code: int | None = None


@contextlib.contextmanager
def imports_not_collected() -> Iterator[None]:
    """Collect no garbage until `collect_from_here`.

    Importing torch, its compiler and Hydra makes a million objects and next to no garbage, and
    going through them again and again took a sixth of a short run.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def collect_from_here() -> None:
    """Collect garbage again, but never what is there by now; the second call does nothing."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def end_at_once(code: int) -> None:
    """Let the process end with this code, when Python shuts down, without freeing each object.

    The system frees the memory of a process faster than Python, which takes a second for all that
    torch has made. Whatever else has asked to be called at the end, or has threads, comes before.
    """
    global _exit_code
    _exit_code = code


@atexit.register  # before torch and all others do: the last one is called first
def _end() -> None:
    if _exit_code is not None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed: nobody reads it
                stream.flush()
        os._exit(_exit_code)
