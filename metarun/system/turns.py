"""Which of the runs that share a machine this one is."""

from collections.abc import Iterator
from contextlib import contextmanager

_number = 0


def turn() -> int:
    """The number of this process's run among those of its machine, from 0."""
    return _number


@contextmanager
def taking_turn(number: int) -> Iterator[None]:
    """Give the run in the block a number."""
    global _number
    before, _number = _number, number
    try:
        yield
    finally:
        _number = before
