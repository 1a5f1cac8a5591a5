"""A lock for what threads share, which objects that have it can be copied and pickled with."""

from threading import RLock
from types import TracebackType


class OneAtATime:
    """Lets one thread at a time into its `with` blocks; a thread that is in may enter again.

    A copy is the lock itself: functions are not copied with the object that holds them, so what
    they share stays shared. Out of a pickle comes a new lock, since all of it is new there.
    """

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def __copy__(self) -> "OneAtATime":
        return self

    def __deepcopy__(self, known: dict[int, object]) -> "OneAtATime":
        return self

    def __reduce__(self) -> tuple[type["OneAtATime"], tuple[()]]:
        return OneAtATime, ()
