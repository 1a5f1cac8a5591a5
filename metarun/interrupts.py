"""Ending a run on SIGINT or SIGTERM at a point where nothing is half done."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. No `Exception`, so that a whole sweep stops."""


class Aborted(KeyboardInterrupt):
    """A second signal ended the run in the middle of something: nothing may be saved now."""


class Interruption:
    """Turns SIGINT and SIGTERM into `Interrupted`.

    Within `deferred()` the first signal only sets a mark, on which `check` acts, and a second
    one raises `Aborted` at once. Outside the main thread, where Python allows no signal handlers,
    this does nothing.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._deferring = False
        self._previous: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received is not None:
            raise Interrupted(f"interrupted by {self._received.name}")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the code within finish what it is doing; it calls `check` where it can stop."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise Aborted("interrupted twice: stopped at once, with the checkpoint there was")
        self._received = signal.Signals(number)
        if not self._deferring:
            self.check()
