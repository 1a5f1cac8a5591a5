"""Reading a file of `torch.save` without trusting it.

`torch.load(weights_only=True)` runs no code from a file, but a small file can still make it
allocate any amount of memory: by compression, by a pickle that asks for it, by a tensor larger
than its storage. So the file is looked through first, and what remains is what `torch.save`
writes for dictionaries, lists, tuples, plain values and dense tensors. Its tensors take no
more memory than the file has bytes, give or take a few copies, and everything else some hundred
megabytes at most.
"""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from metarun.system.memory import machine_memory

MOST_DIRECTORY = 2**24  # bytes of the archive's list of its members
MOST_PICKLE = 2**25  # bytes of everything that is not a tensor
MOST_VALUES = 500_000
MOST_INSTRUCTIONS = 4 * MOST_VALUES
DEEPEST = 24  # containers within each other
OPCODES = {
    "PROTO",
    "STOP",
    "MARK",
    "EMPTY_DICT",
    "EMPTY_LIST",
    "EMPTY_TUPLE",
    "SETITEM",
    "SETITEMS",
    "APPEND",
    "APPENDS",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "BINGET",
    "LONG_BINGET",
    "BINPUT",
    "LONG_BINPUT",
    "GLOBAL",
    "REDUCE",
    "BINPERSID",
}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class UntrustedError(Exception):
    """The file is damaged, or holds more than data; says what is wrong with it."""


class DamagedError(UntrustedError):
    """The file is no whole archive with right checksums."""


def load(path: Path) -> Any:
    """What `torch.save` wrote to `path`; tensors are on the CPU.

    Raises:
        UntrustedError: the file is damaged, or holds anything but plain values and tensors.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:  # one file from check to use, whatever happens to its name
        check(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a strange file provokes in there has many types
            raise UntrustedError(_brief(error)) from error


def verify(path: Path) -> None:
    """Read a file back from the disk, where the system allows, and `check` it.

    Raises:
        UntrustedError: as `load`.
    """
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from memory
        check(file)


def check(file: BinaryIO) -> None:
    """Look through an archive without loading it: checksums, sizes, the pickle's instructions.

    Raises:
        UntrustedError: as `load`.
    """
    try:
        with _opened(file) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            pickles = [name for name in sizes if name.endswith("/data.pkl")]
            if len(pickles) != 1 or sizes[pickles[0]] > MOST_PICKLE:
                raise UntrustedError("it has no data.pkl of a sensible size")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedError(_brief(error)) from error
    _check_instructions(data)
    top = pickles[0].removesuffix("data.pkl")
    try:
        content = _Outline(data, top, sizes).load()
    except UntrustedError:
        raise
    except Exception as error:  # as above
        raise UntrustedError(_brief(error)) from error
    _check_values(content, sum(sizes.values()))


def _opened(file: BinaryIO) -> zipfile.ZipFile:
    """The archive, whose members are intact, uncompressed and together no larger than it is."""
    size = file.seek(0, os.SEEK_END)
    if size > machine_memory():
        raise UntrustedError(f"it has {size} bytes, more than the memory of this machine")
    file.seek(max(0, size - 22))  # zipfile would read a list of any length
    end = file.read()
    if len(end) < 22 or end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise DamagedError("it does not end as a zip archive")
    if max(struct.unpack("<I", end[12:16])[0], _list_size(file, size)) > MOST_DIRECTORY:
        raise UntrustedError("its list of members is too long")
    file.seek(0)
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
        raise UntrustedError("it is compressed or encrypted")
    if sum(m.file_size for m in members) > size or any(
        m.file_size != m.compress_size for m in members
    ):
        raise UntrustedError("its members claim to be larger than the file")
    if len({m.filename for m in members}) < len(members):
        raise UntrustedError("two members have one name")
    # torch does not check the checksums that it writes; zipfile does.
    if (damaged := archive.testzip()) is not None:
        raise DamagedError(f"bad checksum of {_brief(damaged)}")
    return archive


def _list_size(file: BinaryIO, size: int) -> int:
    """Bytes of the list of members by the larger end record, which counts where there is one.

    torch writes one always. Each reader must look for it at the same place: right before its
    locator, which is right before the small end record.
    """
    file.seek(max(0, size - 22 - 20 - 56))
    record = file.read()[:-22]
    if record[-20:-16] != b"PK\6\7":
        return 0
    disk, place, disks = struct.unpack("<IQI", record[-16:])
    if (disk, place, disks) != (0, size - 22 - 20 - 56, 1) or record[:4] != b"PK\6\6":
        raise DamagedError("it does not end as a zip archive")
    length: int = struct.unpack("<Q", record[40:48])[0]
    return length


def _check_instructions(data: bytes) -> None:
    """Refuse a pickle with instructions that `torch.save` does not use for plain content.

    Also one with so many that what they make would not fit the limits of `_check_values`: each
    value takes far more memory than the byte that asks for it.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MOST_INSTRUCTIONS:
                raise UntrustedError("its values are too many or too deeply nested")
            if opcode.name not in OPCODES:
                raise UntrustedError(f"its pickle has the instruction {opcode.name}")
            # Unpicklers make room for as many values as the index says.
            if opcode.name.endswith("BINPUT") and (argument or 0) > count:
                raise UntrustedError("its pickle numbers values that are not there")
    except UntrustedError:
        raise
    except Exception as error:  # damage has many types in pickletools
        raise UntrustedError(f"its pickle is damaged: {_brief(error)}") from error


class _Storage(NamedTuple):
    dtype: torch.dtype
    elements: int


class _Tensor(NamedTuple):
    """Stands for a tensor in the outline."""

    bytes: int


class _Outline(pickle.Unpickler):
    """Loads the content with a note in place of each tensor."""

    def __init__(self, data: bytes, top: str, sizes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self._top, self._sizes = top, sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _outline_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise UntrustedError(f"it asks for {_brief(f'{module}.{name}')}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(elements) is not int:
            raise UntrustedError("it describes a storage that cannot be")
        if self._sizes.get(f"{self._top}data/{key}") != elements * dtype.itemsize:
            raise UntrustedError("a tensor's storage has another size than it claims")
        return _Storage(dtype, elements)


def _outline_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any
) -> _Tensor:
    numbers = (offset, *size, *stride)
    if not (
        isinstance(storage, _Storage)
        and type(size) is type(stride) is tuple
        and len(size) == len(stride)
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and type(requires_grad) is bool
        and hooks == OrderedDict()
    ):
        raise UntrustedError("it describes a tensor that cannot be")
    elements, reach = 1, 0
    for step, length in sorted(zip(stride, size, strict=True)):
        if length > 1 and step <= reach and 0 not in size:
            raise UntrustedError("a tensor names one place of its storage twice")
        elements *= length
        reach += (length - 1) * step
    if elements and (elements > storage.elements or offset + reach >= storage.elements):
        raise UntrustedError("a tensor is larger than its storage")
    return _Tensor(elements * storage.dtype.itemsize)


def _check_values(content: Any, most_bytes: int) -> None:
    """Refuse what is too deep or too much, also by naming one thing many times."""
    left, seen = [(content, 0)], 0
    while left:
        value, depth = left.pop()
        seen += 1
        if seen + len(left) > MOST_VALUES or depth > DEEPEST:
            raise UntrustedError("its values are too many or too deeply nested")
        if isinstance(value, _Tensor):
            most_bytes -= value.bytes
            if most_bytes < 0:
                raise UntrustedError("its tensors together are larger than the file")
        elif isinstance(value, dict):
            if any(type(key) not in (str, int) for key in value):
                raise UntrustedError("a dictionary has keys that are neither words nor numbers")
            left += ((item, depth + 1) for item in value.values())
        elif type(value) in (list, tuple):
            left += ((item, depth + 1) for item in value)
        elif type(value) is int:
            if abs(value) >= 2**63:
                raise UntrustedError("a number has more than 64 bits")
        elif value is not None and type(value) not in (str, float, bool):
            raise UntrustedError("it holds something that is neither a plain value nor a tensor")


def _brief(message: object) -> str:
    """A message of others, short: they may quote the file at length."""
    lines = str(message).splitlines() or [type(message).__name__]
    return lines[0][:120]
