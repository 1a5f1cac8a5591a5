"""Ending a run on a signal at a point where nothing is half done."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

log = logging.getLogger(__name__)


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

    Args:
        agree: where several processes make one run, turns each one's marks into the largest of
            all. Every process then has to call `check` as often as the others.
    """

    def __init__(self, agree: Callable[[list[int]], list[int]] | None = None) -> None:
        self._agree = agree
        self._received: signal.Signals | None = None
        self._warned = False
        self._save_wanted = False
        self._deferring = False
        self._previous: dict[signal.Signals, Any] = {}
        self._preemption = preemption_signal()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come, to whichever process of the run."""
        warned, self._warned = self._warned, False
        marks = [self._received or 0, int(warned)]
        if self._agree is not None:
            marks = self._agree(marks)
        self._save_wanted |= bool(marks[1])
        if marks[0]:
            self._stop(signal.Signals(marks[0]))

    def _stop(self, number: signal.Signals) -> NoReturn:
        message = f"interrupted by {number.name}"
        if number == self._preemption:
            raise Preempted(message, number)
        raise Interrupted(message)

    def save_wanted(self) -> bool:
        """Whether a `check` since the last call has seen a warning that the run may be killed."""
        wanted, self._save_wanted = self._save_wanted, False
        if wanted:
            log.info("SIGTERM: saving a checkpoint, and going on for as long as it lasts")
        return wanted

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the code within finish what it is doing; it calls `check` where it can stop.

        After an error a signal still only sets its mark: nothing may disturb the clearing up.
        """
        self._deferring = True
        yield
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
        if self._agree is not None and isinstance(error, Exception):
            self._deferring = True  # torchrun sends SIGTERM as soon as it sees a process fail,
            return  # and it is yet to be said why
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._preemption is not None and number == signal.SIGTERM:
            self._warned = True
            return
        if self._received is not None:
            if number == self._preemption:
                return  # said twice; the checkpoint is on its way
            raise Aborted("interrupted twice: stopped at once, with the checkpoint there was")
        self._received = signal.Signals(number)
        if not self._deferring:
            self._stop(self._received)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM is a `KeyboardInterrupt`: launchers end their processes on that.

    Outside the main thread, where Python allows no signal handlers, this does nothing.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt("interrupted by SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def preemption_signal() -> signal.Signals | None:
    """The signal on which submitit requeues this process's job; None outside of submitit."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    number = signal.Signals[f"SIG{name}"]
    # A process that was merely started by such a job has no handler of submitit's.
    return number if callable(signal.getsignal(number)) else None
