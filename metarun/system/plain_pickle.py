"""Pickles as plain values: numbers, words, containers and arrays. Nothing in them is ever called.

A pickle is a program, and Python's own reader calls whatever that program names. This reader does
the same to the stack, with values alone: of names it knows those that make up an array of NumPy.

Large arrays stay in the file, so that reading takes little memory, however large the file is.
"""

import mmap
import pickletools
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from metarun.system.pickled_arrays import Array, Dtype, Span, make
from metarun.system.untrusted import DamagedError, UntrustedError

KEPT = 1024  # bytes up to which words are read at once

PREFIXES = {
    "SHORT_BINSTRING": (1, "words"),
    "BINSTRING": (4, "words"),
    "SHORT_BINUNICODE": (1, "utf-8"),
    "BINUNICODE": (4, "utf-8"),
    "BINUNICODE8": (8, "utf-8"),
    "SHORT_BINBYTES": (1, "bytes"),
    "BINBYTES": (4, "bytes"),
    "BINBYTES8": (8, "bytes"),
    "BYTEARRAY8": (8, "bytes"),
}
"""Texts: bytes of the length that goes before them, and what they are."""


class Name(NamedTuple):
    """Something that a pickle names: a function or a class, which is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def read_pickle(path: Path) -> Any:
    """What a pickle holds, of Python 2 or 3 and of any protocol.

    Words of Python 2 are strings here, as are the keys of dictionaries. Other bytes, and long
    words, are `Span`s. Arrays are `Array`s, with `numpy()` for their values.

    Raises:
        UntrustedError: it holds something else, is damaged, or cut short.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).run()
    except UntrustedError as error:
        raise type(error)(f"{path.name} {error}") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path.name} is damaged, or no pickle") from error


class _Reader:
    """The machine that a pickle is a program for: a stack, marks on it, and a memory."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.last: tuple[str, Span] | None = None  # the words that were read last, and where

    def run(self) -> Any:
        table = self._table()
        while True:
            code = self.data.read(1)
            if not code:
                raise DamagedError("is cut short")
            if code == b".":
                break
            table[code[0]]()
        (result,) = self.stack
        return result

    def _table(self) -> dict[int, Callable[[], None]]:
        """What each code does."""
        table = {}
        for op in pickletools.opcodes:
            own = getattr(self, f"_{op.name.lower()}", None)
            if own is not None:
                table[ord(op.code)] = own
            elif op.name in PREFIXES:
                table[ord(op.code)] = self._text_reader(*PREFIXES[op.name])
            elif op.name in CONSTANTS:
                table[ord(op.code)] = self._constant_reader(op)
            else:
                table[ord(op.code)] = self._refusal(op.name)
        return table

    def _text_reader(self, width: int, kind: str) -> Callable[[], None]:
        def read() -> None:
            length = int.from_bytes(self._exactly(width), "little")
            start = self.data.tell()
            if length > len(self.data) - start:
                raise DamagedError("is cut short")
            place = Span(self.path, start, length, kind)
            if kind == "bytes" or length > KEPT:
                self.data.seek(start + length)
                self.stack.append(place)
                return
            text = self.data.read(length).decode("latin-1" if kind == "words" else "utf-8")
            self.last = (text, place)
            self.stack.append(text)

        return read

    def _constant_reader(self, op: pickletools.OpcodeInfo) -> Callable[[], None]:
        if op.arg is None:
            value = CONSTANTS[op.name]
            return lambda: self.stack.append(value)
        reader = op.arg.reader
        return lambda: self.stack.append(reader(self.data))  # type: ignore[arg-type]

    def _refusal(self, name: str) -> Callable[[], None]:
        def refuse() -> None:
            raise UntrustedError(
                f"would make an object ({name}): only numbers, words, lists, tuples, "
                "dictionaries and arrays of NumPy are read"
            )

        return refuse

    def _exactly(self, count: int) -> bytes:
        found = self.data.read(count)
        if len(found) < count:
            raise DamagedError("is cut short")
        return found

    def _number(self, width: int) -> int:
        return int.from_bytes(self._exactly(width), "little")

    def _popped(self) -> list[Any]:
        """What lies above the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    # ------------------------------------------------------------------ what says nothing of values

    def _proto(self) -> None:
        self._exactly(1)

    def _frame(self) -> None:
        self._exactly(8)

    def _mark(self) -> None:
        self.marks.append(len(self.stack))

    def _pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self) -> None:
        self._popped()

    def _dup(self) -> None:
        self.stack.append(self.stack[-1])

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _put(self) -> None:
        self.memo[int(self.data.readline())] = self.stack[-1]

    def _binput(self) -> None:
        self.memo[self._number(1)] = self.stack[-1]

    def _long_binput(self) -> None:
        self.memo[self._number(4)] = self.stack[-1]

    def _get(self) -> None:
        self.stack.append(self.memo[int(self.data.readline())])

    def _binget(self) -> None:
        self.stack.append(self.memo[self._number(1)])

    def _long_binget(self) -> None:
        self.stack.append(self.memo[self._number(4)])

    # ------------------------------------------------------------------ containers

    def _empty_list(self) -> None:
        self.stack.append([])

    def _empty_dict(self) -> None:
        self.stack.append({})

    def _empty_set(self) -> None:
        self.stack.append(set())

    def _list(self) -> None:
        self.stack.append(self._popped())

    def _tuple(self) -> None:
        self.stack.append(tuple(self._popped()))

    def _frozenset(self) -> None:
        self.stack.append(frozenset(self._popped()))

    def _tuple1(self) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _dict(self) -> None:
        self.stack.append(dict(_pairs(self._popped())))

    def _append(self) -> None:
        value = self.stack.pop()
        _of(list, self.stack[-1]).append(value)

    def _appends(self) -> None:
        values = self._popped()
        _of(list, self.stack[-1]).extend(values)

    def _additems(self) -> None:
        values = self._popped()
        _of(set, self.stack[-1]).update(values)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _of(dict, self.stack[-1]).update(_pairs([key, value]))

    def _setitems(self) -> None:
        values = self._popped()
        _of(dict, self.stack[-1]).update(_pairs(values))

    # ------------------------------------------------------------------ names, and arrays of them

    def _global(self) -> None:
        module, name = (self.data.readline().rstrip(b"\n").decode() for _ in range(2))
        self.stack.append(Name(module, name))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(module, name))

    def _reduce(self) -> None:
        values, function = self.stack.pop(), self.stack.pop()
        self.stack.append(make(str(_of(Name, function)), _of(tuple, values)))

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Array | Dtype):
            raise UntrustedError("gives an object attributes, which is not read")
        if self.last and isinstance(self.stack[-1], Array) and state[-1] is self.last[0]:
            state = (*state[:-1], self.last[1])  # of Python 2, whose words may be bytes
        self.stack[-1].fill(_of(tuple, state))


CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONSTANTS |= dict.fromkeys(["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"])
CONSTANTS |= dict.fromkeys(["FLOAT", "BINFLOAT", "STRING", "UNICODE"])
"""Codes whose value follows them as `pickletools` reads it, or is this one."""


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"no {kind.__name__}")
    return value


def _pairs(values: list[Any]) -> Iterator[tuple[Hashable, Any]]:
    for key, value in zip(values[::2], values[1::2], strict=True):
        if isinstance(key, Span):
            key = key.read().decode("latin-1")
        if isinstance(key, Array | Name):
            raise ValueError("no key")
        yield key, value
