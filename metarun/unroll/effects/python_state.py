"""What a function keeps in Python from call to call: counters, flags, coefficients.

A recording repeats tensor operations and no Python. So a function that counts its calls, or that
anneals a coefficient by a count, must not be recorded.
"""

import hashlib
import sys
import types
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from metarun.unroll.effects.iterators import is_iterator, position

Value = bool | int | float | complex | str | None

MOST_OBJECTS = 20_000  # that are looked at; a data set may be among them
MOST_BYTES = 10**6  # of an array that is looked at
FOREIGN = ("torch", "builtins", "numpy", "collections", "functools", "typing", "logging")
"""Packages whose objects keep nothing of a plugin's."""
RECORDINGS = "metarun.unroll.recording.recorded"  # they count their calls


class PythonState(NamedTuple):
    """The plain values within reach of a function.

    Attributes:
        values: a name for a message and the value, by the owner's identity and the key in it.
        owners: what was looked at, by identity; alive, so that nothing else takes that.
    """

    values: dict[tuple[int, Any], tuple[str, Value]]
    owners: dict[int, Any]


def python_state(fn: Any) -> PythonState:
    """What a function keeps in Python, as it is now.

    Values are attributes of modules and of other objects, variables that functions close over,
    global variables of the functions' modules, and what lists and dictionaries hold.

    Args:
        fn: a function, a method, a `functools.partial` or a callable object.
    """
    state = PythonState({}, {})
    waiting = [fn]
    while waiting and len(state.owners) < MOST_OBJECTS:
        thing = waiting.pop()
        if id(thing) in state.owners:
            continue
        state.owners[id(thing)] = thing
        for key, name, value in _parts(thing):
            if isinstance(value, Value):
                state.values[id(thing), key] = name, value
            elif isinstance(value, types.ModuleType):
                if _is_users(value):
                    waiting.append(value)
            elif not isinstance(value, Tensor):
                waiting.append(value)
    return state


def changed(before: PythonState, after: PythonState) -> str | None:
    """A value that is not what it was, in words; None if there is none."""
    for (owner, key), (name, value) in after.values.items():
        if owner not in before.owners:
            continue
        if (owner, key) not in before.values:
            return f"{name}, which was not there, to {value!r}"
        if not _same(earlier := before.values[owner, key][1], value):
            return f"{name} from {earlier!r} to {value!r}"
    return None


def _same(a: Value, b: Value) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))  # NaN is like NaN


def _parts(thing: Any) -> Iterator[tuple[Any, str, Any]]:
    """What an object holds: (key, name for a message, value)."""
    if isinstance(thing, partial):
        yield from _numbered("an argument", [thing.func, *thing.args, *thing.keywords.values()])
    elif isinstance(thing, types.MethodType):
        yield from _numbered("a method", [thing.__func__, thing.__self__])
    elif isinstance(thing, types.FunctionType):
        yield from _parts_of_function(thing)
    elif isinstance(thing, dict):
        yield from ((key, str(key), value) for key, value in thing.items() if _is_name(key))
    elif isinstance(thing, list | tuple | deque):
        yield from _numbered("an entry of a list", list(thing))
    elif isinstance(thing, set | frozenset):
        yield "items", "a set", " ".join(sorted(repr(x) for x in thing if isinstance(x, Value)))
    elif isinstance(thing, types.ModuleType):
        for key, value in vars(thing).items():
            if isinstance(value, (*Value.__args__, list, dict)):
                yield key, f"{thing.__name__}.{key}", value
    elif type(thing).__module__ == "numpy" and hasattr(thing, "tobytes"):
        if thing.nbytes <= MOST_BYTES:
            yield "numbers", "an array", hashlib.sha256(thing.tobytes()).hexdigest()[:12]
    elif isinstance(thing, type):
        if not _is_foreign(thing):
            yield from ((k, f"{thing.__name__}.{k}", v) for k, v in vars(thing).items())
    elif is_iterator(thing):
        yield "next", "an iterator", position(thing)
    elif isinstance(thing, nn.Module) or not _is_foreign(type(thing)):
        kind = type(thing)
        own = getattr(thing, "__dict__", {})
        yield from ((key, f"{kind.__name__}.{key}", value) for key, value in own.items())
        for slot in _slots(kind):
            if hasattr(thing, slot):
                yield slot, f"{kind.__name__}.{slot}", getattr(thing, slot)
        yield "its class", kind.__name__, kind


def _numbered(name: str, values: list[Any]) -> Iterator[tuple[Any, str, Any]]:
    """Values with their places for keys."""
    yield from ((place, name, value) for place, value in enumerate(values))


def _parts_of_function(fn: types.FunctionType) -> Iterator[tuple[Any, str, Any]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            yield ("closed over", name), name, cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from _numbered("a default", [*(fn.__defaults__ or ())])
    yield from ((("attribute", k), f"{fn.__name__}.{k}", v) for k, v in vars(fn).items())
    if not _is_foreign(fn) and not _is_own(fn):
        for name in _names(fn.__code__):
            if name in fn.__globals__:
                yield ("global", name), name, fn.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    """Names that a function's code, or that of a function within, looks up outside."""
    within = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*(_names(part) for part in within))


def _is_name(key: Any) -> bool:
    return isinstance(key, str | int)


def _slots(kind: type) -> list[str]:
    """The attributes of a class's instances that are in no `__dict__`."""
    given = [vars(base).get("__slots__", ()) for base in kind.__mro__ if not _is_foreign(base)]
    named = [(names,) if isinstance(names, str) else tuple(names) for names in given]
    return [name for names in named for name in names if not name.startswith("__")]


def _is_users(module: types.ModuleType) -> bool:
    """Whether a module is of the user's own, and not installed."""
    root, file = module.__name__.partition(".")[0], getattr(module, "__file__", None) or ""
    installed = root in sys.stdlib_module_names or "site-packages" in file
    return bool(file) and not installed and root not in ("metarun", *FOREIGN)


def _is_own(fn: types.FunctionType) -> bool:
    """Whether a function is metarun's: its modules keep what concerns a call under way only.

    A thread that calls it for the first time has nothing of that yet.
    """
    return str(fn.__module__).partition(".")[0] == "metarun"


def _is_foreign(thing: Any) -> bool:
    module = str(getattr(thing, "__module__", "builtins"))
    if module.startswith("torch.optim"):  # a schedule counts its steps
        return False
    return module.partition(".")[0] in FOREIGN or module == RECORDINGS
