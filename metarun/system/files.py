"""Writing files so that a reader sees the old content or the new, never a part of it."""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

log = logging.getLogger(__name__)


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    check: Callable[[Path], object] = lambda written: None,
) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk, rename it over `path`.

    A crash at any moment leaves the previous file intact. The temporary file carries the
    process id, so that two writers cannot mix their bytes; it is removed if `write` fails, or
    `check`, which gets it before it replaces anything.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an `OSError` from within the name of the file, which writing does not tell."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class LockedError(OSError):
    """Another process holds the lock; the message says which, if it has had the time to."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system drops when the process ends, however it ends.

    The file says who holds it. Where there are no locks, there is a warning and no lock.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            raise LockedError(holder or "it is just starting") from None
        except OSError as error:
            log.warning(
                "%s is on a file system without locks (%s): see to it that no second process "
                "runs in it", path.parent, error.strerror,
            )  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name, too
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def remove_half_written(folder: Path) -> None:
    """Delete the temporary files of writers that were killed, in a folder, not those within.

    For a folder that no living process writes to.
    """
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that they outlast a power cut."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: without it a rename may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented; NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON value with null for each number that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cache_dir() -> Path:
    """The folder for files that can be made again: $METARUN_CACHE, else the user's cache."""
    if explicit := os.environ.get("METARUN_CACHE"):
        return Path(explicit).expanduser()
    return platformdirs.user_cache_path("metarun", appauthor=False)
