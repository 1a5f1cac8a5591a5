"""What a loss changes around it: buffers, counters, random numbers of Python.

A step that is recomputed evaluates its loss again. The loss must then find what it found the first
time, and what it had left behind must be there afterwards.
"""

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from metarun.unroll._torch import temporarily_clear_interpreter_stack, unwrap_if_dead
from metarun.unroll.effects.iterators import is_iterator, position

_MISSING: Any = object()
_SIMPLE = (int, float, complex, str, bytes, type(None))
_NEVER_STATE = ("_parameters", "_modules", "_buffers")  # of a module; buffers are looked at apart
_DEPTH = 4  # functions within functions that are looked into
_LONGEST = 256  # items of a dict or list that is looked into


class Place(NamedTuple):
    """Where something is kept from one evaluation of a loss to the next.

    Attributes:
        key: tells it from others.
        name: for messages.
        read: gives what is there now.
        write: puts something there.
    """

    key: tuple[Any, ...]
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


Values = list[tuple[Place, Any]]

_of_thread = threading.local()


def tracked() -> tuple[Place, ...]:
    """The places that the unroll under way changes."""
    places: tuple[Place, ...] = getattr(_of_thread, "places", ())
    return places


@contextmanager
def tracking(places: Iterable[Place]) -> Iterator[None]:
    """Within the block, what is in these places belongs to the surroundings that are kept."""
    before = tracked()
    _of_thread.places = tuple({place.key: place for place in (*before, *places)}.values())
    try:
        yield
    finally:
        _of_thread.places = before


def values_of(places: Iterable[Place]) -> Values:
    """The places with what is in them now."""
    return [(place, place.read()) for place in places]


def put_back(values: Values) -> None:
    """Put each value into its place."""
    for place, value in values:
        place.write(value)


class Observer:
    """Finds the places that change while its block runs.

    It looks at the modules that are called, at what a function uses from outside, and at the
    random numbers of Python and NumPy.

    Args:
        fn: the function that the block calls.

    Attributes:
        changed: the places, with what was there before the block.
        advanced: the name of an iterator that something was taken of; None if there is none.
    """

    def __init__(self, fn: Any) -> None:
        self.changed: Values = []
        self.advanced: str | None = None
        self._fn = fn
        self._thread = threading.get_ident()
        self._called: nn.Module | None = None  # the outermost that runs

    def __enter__(self) -> "Observer":
        self._outside = _Snapshot(*_outside_of(self._fn))
        self._random = values_of(_generators())
        self._hooks = [
            hooks.register_module_forward_pre_hook(self._before_call),
            hooks.register_module_forward_hook(self._after_call, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.advanced = self.advanced or self._outside.advanced()
        changed = self._outside.changes()
        changed += [(place, value) for place, value in self._random if not _same(place, value)]
        self._add(changed)

    def _before_call(self, module: nn.Module, _: Any) -> None:
        if self._called is None and threading.get_ident() == self._thread:
            self._called = module
            self._inside = _Snapshot(_namespaces(module), [])
            self._buffers = [
                _Buffer(part._buffers, name, key, buffer)
                for name, part in module.named_modules()
                for key, buffer in part._buffers.items()
                if buffer is not None and not buffer.is_inference()
            ]

    def _after_call(self, module: nn.Module, _: Any, __: Any) -> None:
        if module is self._called and threading.get_ident() == self._thread:
            self._called = None
            self._add([value for buffer in self._buffers for value in buffer.changes()])
            self._add(self._inside.changes())
            self.advanced = self.advanced or self._inside.advanced()

    def _add(self, changes: Values) -> None:
        known = {place.key for place, _ in self.changed}
        self.changed += [(place, value) for place, value in changes if place.key not in known]


class _Buffer:
    """The numbers in a buffer, to be compared later."""

    def __init__(self, space: dict[str, Any], module: str, key: str, buffer: Tensor) -> None:
        # Where it is written with `out=` within a transform, a wrapper takes its place.
        self.place = _item(space, key, module)
        self.buffer, self.version = buffer, buffer._version
        self.numbers = _contents(buffer, self.place.name)
        self.before = self.numbers.read()

    def changes(self) -> Values:
        """What is another now, with what was there before."""
        if self.buffer._version == self.version:
            return []
        return [(self.place, self.buffer), (self.numbers, self.before)]


class _Snapshot:
    """Shallow copies of namespaces and of variables, to be compared later."""

    def __init__(self, namespaces: Iterable[tuple[Any, str]], cells: list[Place]) -> None:
        self._copies = [
            (space, name, dict(_items(space)))
            for space, name in {id(space): (space, name) for space, name in namespaces}.values()
        ]
        self._cells = values_of(cells)
        held = [(place.name, value) for place, value in self._cells]
        held += [
            (str(key), value) for _, _, before in self._copies for key, value in before.items()
        ]
        self._positions = [(name, it, position(it)) for name, it in held if is_iterator(it)]

    def advanced(self) -> str | None:
        """An iterator that something was taken of."""
        return next((name for name, it, before in self._positions if position(it) != before), None)

    def changes(self) -> Values:
        """What is another now, with what was there before."""
        found = [(place, value) for place, value in self._cells if not _same(place, value)]
        for space, name, before in self._copies:
            now = dict(_items(space))
            new = [] if isinstance(space, list) else [key for key in now if key not in before]
            for key in [*before, *new]:
                value = before.get(key, _MISSING)
                if now.get(key, _MISSING) is not value:
                    found.append((_item(space, key, name), value))
        return [
            (p, v) for p, v in found if _is_state(v) and _is_state(p.read()) and not _same(p, v)
        ]


def _items(space: Any) -> Iterable[tuple[Any, Any]]:
    """What may change in a namespace: a dict, a list, or some variables of a dict."""
    if isinstance(space, list):
        return enumerate(space)
    return ((key, value) for key, value in space.items() if key not in _NEVER_STATE)


def _item(space: Any, key: Any, name: str) -> Place:
    def read() -> Any:
        if isinstance(space, list):
            return space[key] if key < len(space) else _MISSING
        value = space.get(key, _MISSING)
        return unwrap_if_dead(value) if isinstance(value, Tensor) else value

    def write(value: Any) -> None:
        if value is not _MISSING:
            space[key] = value
        elif isinstance(space, dict):
            space.pop(key, None)

    shown = f"{name}.{key}" if isinstance(key, str) and name else f"{name}[{key!r}]"
    return Place(("item", id(space), key), shown if name else str(key), read, write)


def _contents(buffer: Tensor, name: str) -> Place:
    """The numbers in a buffer, which may be written in place."""

    def read() -> Tensor:
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            return buffer.detach().clone()

    def write(value: Tensor) -> None:
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            buffer.copy_(value)

    return Place(("contents", id(buffer)), f"the buffer {name}", read, write)


def _cell(cell: CellType, name: str) -> Place:
    def write(value: Any) -> None:
        cell.cell_contents = value

    return Place(("cell", id(cell)), name, lambda: cell.cell_contents, write)


def _generators() -> Iterator[Place]:
    yield Place(("random",), "Python's random numbers", random.getstate, random.setstate)
    if numpy := sys.modules.get("numpy"):
        of_numpy = numpy.random
        yield Place(("numpy",), "NumPy's random numbers", of_numpy.get_state, of_numpy.set_state)


def _namespaces(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The attributes and buffers of a module and of those within it, and what they list."""
    for name, part in module.named_modules():
        yield vars(part), name
        yield part._buffers, name
        yield from _containers(vars(part), name)


def _containers(space: Mapping[str, Any], name: str) -> Iterator[tuple[Any, str]]:
    for key, value in space.items():
        if _is_container(value) and key not in _NEVER_STATE:
            yield value, f"{name}.{key}" if name else key


def _is_container(value: Any) -> bool:
    return type(value) in (dict, list) and len(value) <= _LONGEST


def _is_state(value: Any) -> bool:
    """Whether something may be put back: objects that others know of are left alone."""
    if isinstance(value, tuple):
        return all(map(_is_state, value))
    return value is _MISSING or isinstance(value, (*_SIMPLE, Tensor))


def _outside_of(fn: Any, depth: int = 0) -> tuple[list[tuple[Any, str]], list[Place]]:
    """The namespaces and the variables that a function uses and that are not its own."""
    spaces: list[tuple[Any, str]] = []
    cells: list[Place] = []

    def add(value: Any, name: str) -> None:
        if _is_container(value):
            spaces.append((value, name))
        elif isinstance(value, nn.Module):
            spaces.extend(_namespaces(value))
        elif isinstance(value, FunctionType | MethodType | partial):
            if depth < _DEPTH:
                more_spaces, more_cells = _outside_of(value, depth + 1)
                spaces.extend(more_spaces)
                cells.extend(more_cells)
        elif not isinstance(value, Tensor | type | ModuleType):
            own = getattr(value, "__dict__", {})
            spaces.append((own, name))
            spaces.extend(_containers(own, name))
            for key, item in own.items():
                if isinstance(item, FunctionType | MethodType | partial | nn.Module):
                    add(item, key)

    if isinstance(fn, MethodType):
        add(fn.__self__, type(fn.__self__).__name__)
        fn = fn.__func__
    if isinstance(fn, partial):
        for value in (fn.func, *fn.args, *fn.keywords.values()):
            add(value, "an argument")
    elif isinstance(fn, FunctionType):
        if (fn.__module__ or "").partition(".")[0] in ("torch", "numpy"):
            return spaces, cells
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            if is_filled(cell):
                cells.append(_cell(cell, name))
                add(cell.cell_contents, name)
        used = {n: fn.__globals__[n] for n in fn.__code__.co_names if n in fn.__globals__}
        for name, value in used.items():
            cells.append(_item(fn.__globals__, name, ""))
            add(value, name)
    elif depth == 0:
        add(fn, type(fn).__name__)
        call = vars(type(fn)).get("__call__")
        if isinstance(call, FunctionType) and not isinstance(fn, nn.Module):
            add(call, "")
    return spaces, cells


def is_filled(cell: CellType) -> bool:
    """Whether a variable that a function closes over has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _same(place: Place, before: Any) -> bool:
    return _equal(place.read(), before)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, _SIMPLE) and isinstance(b, _SIMPLE):
        return type(a) is type(b) and (a == b or (a != a and b != b))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        return a == b
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(a, numpy.ndarray) and isinstance(b, numpy.ndarray):
        return bool(numpy.array_equal(a, b))
    return False
