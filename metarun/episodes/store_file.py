"""One file per data set: examples by class, mapped into memory and shared between processes.

It is a safetensors file, which any tool can open:

    images     uint8 (images, channels, height, width), class by class
    sizes      int64 (classes,), the number of images of each class
    files      uint8, the names of the pictures that the images were made of, ended by zero bytes
    skipped    uint8, likewise those that could not be read

Its metadata have one entry `metarun`, JSON: the `format`, the names of the classes, the `identity`
(the digest of the content), and the `key`: what the file was made of and how.

A file is written as a whole or not at all. Its content is verified when it is written. When it is
opened, its parts are compared with each other, and files up to `VERIFIED` bytes with their digest:
however large, a file opens at once.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open

from metarun.episodes.store import ClassStore, Origin, from_sizes, identity_of, packed
from metarun.system.archive import ENTRY, MOST_HEADER
from metarun.system.files import write_atomically

FORMAT = 3  # raise when the content of a file changes meaning
VERIFIED = 2**27  # bytes that take a tenth of a second to read and compare


class StaleError(ValueError):
    """A file was made of something else, or otherwise."""


class Header(NamedTuple):
    """What a file begins with, and where its parts are.

    Attributes:
        text: the first bytes of the file.
        sizes, images, files: the first byte of each part.
        length: of the whole file.
    """

    text: bytes
    sizes: int
    images: int
    files: int
    length: int


def header(
    shape: Sequence[int],
    class_names: Sequence[str],
    *,
    files: int = 0,
    skipped: int = 0,
    key: str = "",
    identity: str = "",
    room: int = 0,
) -> Header:
    """The header of a file.

    Args:
        shape: of all images.
        class_names: one name a class.
        files: bytes of the names of pictures.
        skipped: bytes of the names of pictures that were left out.
        key: what the file is made of and how.
        identity: the digest of the content.
        room: bytes that it takes at least, so that what follows can be written before.
    """
    fields = {"format": FORMAT, "key": key, "identity": identity, "class_names": [*class_names]}
    parts: dict[str, Any] = {"__metadata__": {ENTRY: json.dumps(fields)}}
    starts: list[int] = []
    end = 0
    for name, kind, dimensions, size in (
        ("sizes", "I64", [len(class_names)], 8 * len(class_names)),
        ("images", "U8", [*shape], torch.Size(shape).numel()),
        ("files", "U8", [files], files),
        ("skipped", "U8", [skipped], skipped),
    ):
        starts.append(end)
        end += size
        span = {"data_offsets": [starts[-1], end]}
        parts[name] = {"dtype": kind, "shape": dimensions, **span}
    text = json.dumps(parts).encode()
    length = -(-max(len(text), room - 8) // 8) * 8  # numbers of 8 bytes follow
    if length > MOST_HEADER:
        raise ValueError("the names of the classes are too many")
    data = 8 + length
    whole = length.to_bytes(8, "little") + text.ljust(length)
    sizes, images, files_at, _ = (data + start for start in starts)
    return Header(whole, sizes, images, files_at, data + end)


def as_bytes(names: Sequence[str]) -> bytes:
    """Names of files, which may be no Unicode, each ended by a zero byte."""
    return b"".join(os.fsencode(name) + b"\0" for name in names)


def write_store(path: Path, store: ClassStore, key: str = "") -> None:
    """Write images that are in memory.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    own = packed(store)
    head = header(own.images.shape, store.class_names, key=key, identity=store.identity)

    def write(file: BinaryIO) -> None:
        file.write(head.text)
        for part in (own.sizes, own.images):
            file.write(part.numpy().data)

    write_atomically(path, write, lambda written: verify(open_store(written, key)))


def open_store(path: Path, key: str = "") -> ClassStore:
    """The store in a file, whose images are read where they are used.

    Args:
        key: what it has to be made of.

    Raises:
        StaleError: it is made of something else.
        Exception: it is not there, or damaged.
    """
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()[ENTRY])
        if fields.get("format") != FORMAT:
            raise StaleError("it is of another version of metarun")
        if fields["key"] != key:
            raise StaleError("what it was made of has changed")
        images, sizes = file.get_tensor("images"), file.get_tensor("sizes")
    names, known = tuple(fields["class_names"]), fields["identity"]
    if (
        images.dtype is not torch.uint8
        or images.dim() != 4
        or sizes.dtype is not torch.int64
        or sizes.shape != (len(names),)
        or sizes.min() < 1
        or int(sizes.sum()) != len(images)
        or not all(isinstance(name, str) for name in names)
        or not isinstance(known, str)
    ):
        raise ValueError("the parts do not fit together")
    store = replace(from_sizes(images, sizes, names, known), origin=Origin(path))
    if images.nbytes <= VERIFIED:
        verify(store)
    return store


def verify(store: ClassStore) -> None:
    """Compare all images with the digest of the content.

    Raises:
        ValueError: they are not those that were written.
    """
    shape, content = tuple(store.images.shape), [store.images.numpy().data]
    if identity_of(shape, content, store.sizes, store.class_names) != store.known:
        raise ValueError("bad checksum")


def picture_names(store: ClassStore) -> list[str]:
    """The names of the pictures that the images of a store were made of, where there are some."""
    if store.origin is None:
        return []
    return _names(store.origin.file, "files")[store.origin.first :][: len(store.images)]


def skipped_names(store: ClassStore) -> list[str]:
    """The names of the pictures that could not be read when its file was made."""
    return [] if store.origin is None else _names(store.origin.file, "skipped")


def _names(path: Path, part: str) -> list[str]:
    with safe_open(path, framework="pt") as file:
        text = file.get_tensor(part).numpy().tobytes()
    return [os.fsdecode(name) for name in text.split(b"\0")[:-1]]
