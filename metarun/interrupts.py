"""Ending a run on a signal at a point where nothing is half done."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. No `Exception`, so that a whole sweep stops."""


class Preempted(Interrupted):
    """The cluster wants its node back: submitit can put the job into the queue again."""

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.number = number


class Aborted(KeyboardInterrupt):
    """A second signal ended the run in the middle of something: nothing may be saved now."""


class Interruption:
    """Turns SIGINT and SIGTERM into `Interrupted`.

    Within `deferred()` the first signal only sets a mark, on which `check` acts, and a second
    one raises `Aborted` at once. Outside the main thread, where Python allows no signal handlers,
    this does nothing.

    In a job of submitit the signal that it requeues on (SIGUSR2, usually) becomes `Preempted`.
    SIGTERM does not end such a job: clusters send it some time before they kill, to everybody,
    and `save_wanted` tells that now is the time for a checkpoint.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._save_wanted = False
        self._deferring = False
        self._previous: dict[signal.Signals, Any] = {}
        self._preemption = preemption_signal()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received is None:
            return
        message = f"interrupted by {self._received.name}"
        if self._received == self._preemption:
            raise Preempted(message, self._received)
        raise Interrupted(message)

    def save_wanted(self) -> bool:
        """Whether this process has been warned since the last call that it may be killed."""
        wanted, self._save_wanted = self._save_wanted, False
        return wanted

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
            numbers = [signal.SIGINT, signal.SIGTERM]
            if self._preemption is not None:
                numbers.append(self._preemption)
            for number in numbers:
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
        if self._preemption is not None and number == signal.SIGTERM:
            self._save_wanted = True
            return
        if self._received is not None:
            if number == self._preemption:
                return  # said twice; the checkpoint is on its way
            raise Aborted("interrupted twice: stopped at once, with the checkpoint there was")
        self._received = signal.Signals(number)
        if not self._deferring:
            self.check()


def preemption_signal() -> signal.Signals | None:
    """The signal on which submitit requeues this process's job; None outside of submitit."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    number = signal.Signals[f"SIG{name}"]
    # A process that was merely started by such a job has no handler of submitit's.
    return number if callable(signal.getsignal(number)) else None
