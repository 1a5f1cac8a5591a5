"""The folder of data sets, and downloads into it by torchvision: whole or not at all."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metarun.system.files import cache_dir

TIMEOUT = 10.0  # seconds that a silent server is waited for


def home(root: str | Path | None) -> Path:
    """The folder of data sets; None is a folder in the user's cache."""
    return (cache_dir() / "data" if root is None else Path(root)).expanduser().absolute()


def move(old: Path, new: Path) -> None:
    """Put a finished file or folder in its place, unless another process was quicker."""
    try:
        old.rename(new)
    except OSError:
        if not new.exists():
            raise


@contextmanager
def timeout() -> Iterator[None]:
    """Sockets give up after TIMEOUT; torchvision leaves them to wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
