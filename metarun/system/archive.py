"""Tensors and plain values in one safetensors file, which runs no code when it is read.

The tensors are the file's own, so any tool can open them. Everything else is JSON in its
metadata, under the one entry `metarun`:

    sha256     a digest of the whole file, in which these 64 characters count as zeros
    values     dictionaries, lists and plain values, with null where a tensor belongs
    tensors    for each tensor its path within the values, and its name in the file
    complex    names of the tensors that are kept as pairs of real numbers

The digest shows damage: the format itself has no checksum. safetensors checks that each tensor
lies within the file and overlaps no other. What is left to check here is the size of the header,
and how deep its values are nested.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from metarun.errors import first_line
from metarun.system.memory import machine_memory
from metarun.system.untrusted import DamagedError, UntrustedError, read_regular, read_written

MOST_HEADER = 2**24  # bytes of names, shapes and everything that is no tensor
DEEPEST = 24  # containers within each other
DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    }
)  # fmt: skip
"""Types of tensors that a file can hold."""

ENTRY = "metarun"


def to_bytes(values: dict[str, Any], own_names: Collection[str] = ()) -> bytes:
    """The content of a file.

    Equal values give equal bytes.

    Args:
        values: dictionaries with words as keys, lists, tuples (which come back as lists), plain
            values and dense tensors.
        own_names: entries of `values` whose tensors keep their own name in the file. The name of
            any other tensor is its path, with slashes.

    Raises:
        ValueError: the values hold something else, or far too much that is no tensor.

    Example:
        >>> import torch
        >>> from metarun.system.archive import from_bytes, to_bytes
        >>> data = to_bytes({"step": 3, "meta": {"weight": torch.ones(2)}}, own_names=["meta"])
        >>> from_bytes(data)
        {'step': 3, 'meta': {'weight': tensor([1., 1.])}}
    """
    tensors: dict[str, Tensor] = {}
    places: list[list[Any]] = []
    pairs: list[str] = []

    def without_tensors(value: Any, path: list[str | int]) -> Any:
        if isinstance(value, Tensor):
            name = str(path[-1]) if path[0] in own_names else "/".join(map(str, path))
            while name in tensors:
                name += "'"
            places.append([path, name])
            if value.is_complex():
                pairs.append(name)
                value = torch.view_as_real(value.resolve_conj())
            # A copy: the library refuses views of one storage.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return None
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise ValueError(f"{path} has keys that are no words")
            return {key: without_tensors(item, [*path, key]) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [without_tensors(item, [*path, i]) for i, item in enumerate(value)]
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ValueError(f"{path} is neither a plain value nor a tensor: {type(value).__name__}")

    fields = {"values": without_tensors(values, []), "tensors": places, "complex": pairs}
    mark = hashlib.sha256(json.dumps(fields).encode()).hexdigest()  # until the digest is known
    data = save_tensors(tensors, {ENTRY: json.dumps({"sha256": mark, **fields})})
    if int.from_bytes(data[:8], "little") > MOST_HEADER:
        raise ValueError("the names and the plain values of a file are too many")
    return data.replace(mark.encode(), _digest(data, mark).encode(), 1)


def _digest(data: bytes, mark: str) -> str:
    """The digest of a file whose first `mark` is where the digest goes."""
    start = data.index(mark.encode())
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(b"0" * len(mark))
    digest.update(memoryview(data)[start + len(mark) :])
    return digest.hexdigest()


def read(path: Path) -> dict[str, Any]:
    """The values of a file; their tensors are on the CPU.

    Raises:
        DamagedError: its digest is wrong, or it is no such file at all.
        UntrustedError: it holds what `to_bytes` does not write.
        OSError: it cannot be read.
    """
    return from_bytes(read_regular(path, machine_memory()))


def verify(path: Path) -> None:
    """Read a file back from the disk, where the system allows, and check its digest.

    Raises:
        UntrustedError: as `read`.
        OSError: it cannot be read.
    """
    _fields(read_written(path))


def from_bytes(data: bytes) -> dict[str, Any]:
    """The values in the content of a file; see `read`."""
    fields = _fields(data)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UntrustedError(f"its tensors are none: {first_line(error)[:120]}") from error
    values, places, pairs = (fields.get(name) for name in ("values", "tensors", "complex"))
    if not isinstance(values, dict) or not isinstance(places, list) or not isinstance(pairs, list):
        raise UntrustedError("it does not say where its tensors belong")
    _check_depth(values)
    for place in places:
        try:
            (*path, last), name = place
            value = tensors.pop(name)
            owner: Any = values
            for part in path:
                owner = owner[part]
            if owner[last] is not None:
                raise UntrustedError("it puts a tensor where something else is")
            owner[last] = torch.view_as_complex(value) if name in pairs else value
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UntrustedError("it does not say where its tensors belong") from error
    if tensors:
        raise UntrustedError("it has tensors that belong nowhere")
    return values


def _fields(data: bytes) -> dict[str, Any]:
    """The JSON in the metadata, if the digest is right."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise DamagedError("it is shorter than it should be")
    if size > MOST_HEADER:
        raise UntrustedError("its header is too long")
    try:
        header = _json(data[8 : 8 + size].decode())
        fields = _json(header["__metadata__"][ENTRY])
        mark = fields["sha256"]
        # Nothing but the digest may stand in for the digest.
        right = len(mark) == 64 and _digest(data, mark) == mark
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"it has no header of ours: {first_line(error)[:120]}") from error
    if not right:
        raise DamagedError("bad checksum")
    return dict(fields)


def _json(text: str) -> Any:
    return json.loads(text, parse_int=_int64)


def _int64(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= 2**63:
        _refuse("a number has more than 64 bits")
    return value


def _refuse(reason: str) -> NoReturn:
    raise UntrustedError(reason)


def _check_depth(values: Any) -> None:
    left = [(values, 0)]
    while left:
        value, depth = left.pop()
        if depth > DEEPEST:
            raise UntrustedError("its values are too deeply nested")
        if isinstance(value, dict):
            left += ((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            left += ((item, depth + 1) for item in value)
