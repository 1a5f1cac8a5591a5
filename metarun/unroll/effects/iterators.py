"""How far an iterator has come, without taking anything of it."""

import itertools
import operator
from collections.abc import Mapping
from types import GeneratorType
from typing import Any


def is_iterator(value: Any) -> bool:
    """Whether `next(value)` gives another value each time."""
    return hasattr(type(value), "__next__")


def position(iterator: Any) -> str:
    """A text that differs after `next(iterator)`, as far as that can be seen.

    It can be seen of iterators over lists, tuples, ranges and dicts, of `enumerate`, `zip`, `map`,
    `itertools.count`, of generators, and of objects that count in an attribute, as those of a
    `DataLoader`.
    """
    if isinstance(iterator, itertools.count):
        return repr(iterator)
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        return "" if frame is None else f"{frame.f_lasti} {_described(frame.f_locals)}"
    if isinstance(iterator, enumerate | zip | map | filter):
        inside: Any = iterator.__reduce__()
        return " ".join(_one(part) for part in inside[1])
    if own := getattr(iterator, "__dict__", None):
        return _described(own)
    return str(operator.length_hint(iterator, -1))


def _described(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_one(value)}" for key, value in values.items())


def _one(value: Any) -> str:
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if is_iterator(value) and not isinstance(value, GeneratorType):
        return position(value)
    return " ".join(map(_one, value)) if type(value) is tuple else ""
