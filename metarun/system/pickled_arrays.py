"""Arrays of NumPy as pickles have them: their bytes stay in the file until they are asked for."""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarun.system.untrusted import DamagedError, UntrustedError

MOST_TEXT = 2**26  # bytes of an array that a pickle has as text, which is decoded in memory
KINDS = frozenset("biufSU")  # booleans, numbers and words; no objects


class Span(NamedTuple):
    """A part of a file that was not read.

    Attributes:
        path: of the file.
        offset: its first byte.
        length: bytes.
        kind: "bytes"; "words", a string of Python 2; or "utf-8", text.
    """

    path: Path
    offset: int
    length: int
    kind: str

    def read(self) -> bytes:
        """Its bytes; of text, those that have the numbers of its characters."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        return content.decode().encode("latin-1") if self.kind == "utf-8" else content


class Dtype:
    """The type of the numbers of an array."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def fill(self, state: tuple[Any, ...]) -> None:
        """What comes after it is made: the order of bytes, and that it has no fields."""
        self.order = str(state[1])
        if any(part is not None for part in state[2:5]):
            raise UntrustedError("has an array with fields, which are not read")

    def numpy(self) -> np.dtype[Any]:
        """The type.

        Raises:
            UntrustedError: it is one of objects.
        """
        found = np.dtype(self.code)
        if found.kind not in KINDS:
            raise UntrustedError(f"has an array of {found}: numbers and words are read")
        return found if self.order == "|" else found.newbyteorder(self.order)  # type: ignore[arg-type]


class Array:
    """An array whose bytes may still be in the file.

    Attributes:
        shape: of the array.
        dtype: of its numbers.
        fortran: whether the first dimension changes fastest.
        content: its bytes, or where they are.
    """

    __slots__ = ("content", "dtype", "fortran", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype("u1")
        self.fortran, self.content = False, b""  # type: bool, bytes | Span

    def fill(self, state: tuple[Any, ...]) -> None:
        """Its shape, type, order and bytes, as a pickle has them."""
        shape, dtype, fortran, content = state[-4:]
        self.shape, self.dtype = tuple(int(size) for size in shape), dtype.numpy()
        self.fortran = bool(fortran)
        if isinstance(content, str):  # of Python 2, or of 3 with an old protocol
            content = content.encode("latin-1")
        if not isinstance(content, bytes | Span):
            raise UntrustedError("has an array of objects: numbers and words are read")
        self.content = content
        length = content.length if isinstance(content, Span) else len(content)
        is_text = isinstance(content, Span) and content.kind == "utf-8"
        needed = prod(self.shape) * self.dtype.itemsize
        if min((*self.shape, 0)) < 0 or (length != needed and not (is_text and length >= needed)):
            raise DamagedError(f"has an array of shape {self.shape} with {length} bytes")

    @property
    def place(self) -> Span:
        """Where its bytes are in the file.

        Raises:
            UntrustedError: they are not there as they are.
        """
        if isinstance(self.content, Span) and self.content.kind != "utf-8" and not self.fortran:
            return self.content
        raise UntrustedError(
            f"has an array of shape {self.shape} as text or in columns: pickle it "
            "again by Python 3 with protocol 4"
        )

    def numpy(self) -> NDArray[Any]:
        """The array in memory.

        Raises:
            UntrustedError: it is larger than `MOST_TEXT` bytes.
        """
        if isinstance(self.content, Span) and self.content.length > MOST_TEXT:
            mib = self.content.length >> 20
            raise UntrustedError(f"has {mib} MiB where {MOST_TEXT >> 20} MiB are many")
        content = self.content.read() if isinstance(self.content, Span) else self.content
        order = "F" if self.fortran else "C"
        return np.frombuffer(content, self.dtype).reshape(self.shape, order=order)  # type: ignore[call-overload,no-any-return]


def make(function: str, values: tuple[Any, ...]) -> Any:
    """What a pickle says that a function makes: of arrays and their parts, and of nothing else.

    Raises:
        UntrustedError: it is another function.
    """
    module, _, name = function.rpartition(".")
    of_numpy = module.replace("numpy._core", "numpy.core")  # NumPy 2 has moved it
    match of_numpy, name:
        case "numpy.core.multiarray", "_reconstruct":
            return Array()
        case "numpy.core.numeric", "_frombuffer":
            content, dtype, shape, order = values
            array = Array()
            array.fill((shape, dtype, order == "F", content))
            return array
        case "numpy", "dtype":
            return Dtype(str(values[0]))
        case "numpy.core.multiarray", "scalar":
            dtype, content = values
            one = Array()
            one.fill(((1,), dtype, False, content))
            return one.numpy()[0].item()
        case "_codecs", "encode":
            text, encoding = values
            if encoding == "latin1":
                return text if isinstance(text, Span) else text.encode("latin-1")
        case "__builtin__" | "builtins", "bytes" | "bytearray" if not values:
            return b""
        case "collections", "OrderedDict" if not values:
            return {}
        case "__builtin__" | "builtins", "set" | "frozenset":
            return set(*values)
    raise UntrustedError(
        f"would call {function}: only numbers, words, lists, tuples, dictionaries and arrays of "
        "NumPy are read"
    )
