"""What is made once and kept on disk: by one process, while the others wait for it."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from metarun.episodes.store import ClassStore
from metarun.episodes.store_file import StaleError, open_store, write_store

log = logging.getLogger(__name__)


def cached(path: Path, build: Callable[[], ClassStore]) -> ClassStore:
    """Open the store at `path`, or build it and keep it there for the next time.

    A cache that cannot be written (a full disk, a read-only home) costs time only, so it is
    logged and not an error.
    """
    built = None

    def write() -> None:
        nonlocal built
        built = build()
        write_store(path, built)

    try:
        return kept(path, lambda: open_store(path), write)
    except OSError as error:
        if built is None:
            raise
        log.warning("could not cache the data set in %s (%s)", path, error)
        return built


def kept(path: Path, read: Callable[[], ClassStore], write: Callable[[], None]) -> ClassStore:
    """What `read` finds at `path`; where that is nothing, or not what it should be, `write` first.

    Of several processes that need it, one writes and the others wait.
    """
    with contextlib.suppress(Exception):
        return read()
    with _alone(path):
        if path.exists():  # stale or damaged, or another process has written it meanwhile
            try:
                return read()
            except StaleError as error:
                log.info("making %s anew: %s", path, error)
            except Exception as error:  # any damage has the same remedy: write it again
                log.warning("rebuilding the damaged cache %s (%s)", path, error)
        write()
    return read()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock beside a file, which ends with its process; go without where there is none."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                log.info("waiting for another process, which prepares %s", path)
                held.enter_context(lock.acquire())
        except (OSError, NotImplementedError) as error:  # a read-only home, no locks there
            log.debug("no lock for %s (%s)", path, error)
        yield
