"""A store that is being written, a batch of pictures at a time, and outlasts its process.

Beside the file there is a journal: its first line says what the file is made of, each further one
has the number of a batch that is done, the checksum of its images, and what could not be read. A
conversion that was killed goes on with the batches whose images are there with that checksum.
"""

import contextlib
import errno
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metarun.episodes.store import identity_of
from metarun.episodes.store_file import FORMAT, as_bytes, header
from metarun.errors import DataError
from metarun.pictures.decode import Pixels
from metarun.pictures.listing import bounds
from metarun.system.files import make_folder, naming, sync_folder

log = logging.getLogger(__name__)

LARGEST = 2**22  # bytes of the images of a batch
MOST = 64  # pictures in a batch
NO_IDENTITY = "sha256:" + "0" * 64


class Done(NamedTuple):
    """What is known of a batch that was written.

    Attributes:
        checksum: of its images.
        unreadable: the number of each picture that could not be read, and why.
    """

    checksum: int
    unreadable: list[tuple[int, str]]


class Partial:
    """The unfinished file of a store.

    Args:
        path: of the finished file.
        shape: channels, height and width of an image.
        class_names: one name a class.
        sizes: number of pictures of each class.
        names: of all pictures.
        key: what the store is made of and how.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        class_names: Sequence[str],
        sizes: Sequence[int],
        names: Sequence[str],
        key: str,
    ) -> None:
        self.path, self.shape, self.class_names = path, shape, class_names
        self.sizes, self.names, self.key = sizes, names, key
        self.data = path.with_name(f".{path.name}.partial")
        self.journal = path.with_name(f".{path.name}.journal")
        self.pixels = int(np.prod(shape))  # bytes of an image
        self.rows = max(1, min(MOST, LARGEST // self.pixels))  # pictures in a batch
        self.batches = -(-len(names) // self.rows)
        self.done: dict[int, Done] = {}
        most = len(as_bytes(names))
        self._head = header(
            (len(names), *shape), class_names,
            files=most, skipped=most, key=key, identity=NO_IDENTITY,
        )  # fmt: skip

    def batch(self, number: int) -> range:
        """The numbers of the pictures of a batch."""
        return range(number * self.rows, min((number + 1) * self.rows, len(self.names)))

    def begin(self) -> None:
        """Make the file at its full length, or find out what of it is done.

        Raises:
            OSError: the folder cannot be written, or the disk has no room for it.
        """
        first = json.dumps([FORMAT, self.key]) + "\n"
        with contextlib.suppress(OSError):
            self.done = self._verified(first)
        if not self.done:
            self.discard()
            make_folder(self.path.parent)
            with naming(self.data), open(self.data, "wb") as file:
                _reserve(file.fileno(), self._head.length)
        with open(self.journal, "w", encoding="utf-8") as file:
            file.write(first)
            file.writelines(_line(number, done) for number, done in self.done.items())

    def write(self, number: int, images: Pixels) -> int:
        """Put the images of a batch into their place; gives their checksum.

        Raises:
            OSError: the disk is full.
        """
        content = images.reshape(-1).data
        with naming(self.data), open(self.data, "r+b", buffering=0) as file:
            _write_at(file.fileno(), self._place(number * self.rows), content)
        return zlib.crc32(content)

    def note(self, number: int, done: Done) -> None:
        """Remember that a batch is written.

        Raises:
            OSError: the disk is full.
        """
        self.done[number] = done
        with naming(self.journal), open(self.journal, "a", encoding="utf-8") as file:
            file.write(_line(number, done))

    def finish(self) -> None:
        """Verify all images, leave out those of unreadable pictures, put the file in its place.

        Raises:
            DataError: the disk does not return what was written, or a class has no picture left.
            OSError: it cannot be written.
        """
        unreadable = {row for done in self.done.values() for row, _ in done.unreadable}
        keeps = np.array([row not in unreadable for row in range(len(self.names))])
        sizes = [int(keeps[start:stop].sum()) for start, stop in bounds(self.sizes)]
        if 0 in sizes:
            raise DataError(
                f"no picture of class {self.class_names[sizes.index(0)]!r} can be read: leave the "
                "class out"
            )
        files = as_bytes([name for name, keep in zip(self.names, keeps, strict=True) if keep])
        skipped = as_bytes([self.names[row] for row in sorted(unreadable)])
        numbers, shape = torch.tensor(sizes), (int(keeps.sum()), *self.shape)
        with naming(self.data), open(self.data, "r+b", buffering=0) as file:
            os.fsync(file.fileno())
            identity = identity_of(
                shape, self._packed(file.fileno(), keeps), numbers, self.class_names
            )
            head = header(
                shape, self.class_names, files=len(files), skipped=len(skipped), key=self.key,
                identity=identity, room=len(self._head.text),
            )  # fmt: skip
            os.truncate(file.fileno(), head.length)
            for place, part in (
                (0, head.text),
                (head.sizes, numbers.numpy().tobytes()),
                (head.files, files + skipped),
            ):
                _write_at(file.fileno(), place, part)
            os.fsync(file.fileno())
        os.replace(self.data, self.path)
        sync_folder(self.path.parent)
        self.journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete what there is of the unfinished file."""
        for path in (self.journal, self.data):
            with contextlib.suppress(OSError):
                path.unlink()

    def _packed(self, descriptor: int, keeps: np.ndarray) -> Iterator[bytes]:
        """The images that stay, read from the disk, each moved up to the one before."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # not from memory
        place = self._place(0)
        for number in range(self.batches):
            content = self._read(descriptor, number)
            if zlib.crc32(content) != self.done[number].checksum:
                raise DataError(f"the disk does not return what was written to {self.data}")
            rows = self.batch(number)
            if not keeps[rows.start : rows.stop].all():
                images = np.frombuffer(content, np.uint8).reshape(len(rows), -1)
                content = images[keeps[rows.start : rows.stop]].tobytes()
            if place != self._place(rows.start) or len(content) < len(rows) * self.pixels:
                _write_at(descriptor, place, content)
            place += len(content)
            yield content

    def _verified(self, first: str) -> dict[int, Done]:
        """The batches that the journal says are done, and whose images are there."""
        with open(self.journal, encoding="utf-8") as file:
            if file.readline() != first:
                return {}
            noted = {}
            with contextlib.suppress(ValueError):  # the last line may be half of one
                for line in file:
                    number, checksum, unreadable = json.loads(line)
                    noted[number] = Done(checksum, [(row, why) for row, why in unreadable])
        with open(self.data, "rb", buffering=0) as data:
            return {
                number: done
                for number, done in noted.items()
                if zlib.crc32(self._read(data.fileno(), number)) == done.checksum
            }

    def _read(self, descriptor: int, number: int) -> bytes:
        rows = self.batch(number)
        return os.pread(descriptor, len(rows) * self.pixels, self._place(rows.start))

    def _place(self, row: int) -> int:
        return self._head.images + row * self.pixels


def _line(number: int, done: Done) -> str:
    return json.dumps([number, *done]) + "\n"


def _write_at(descriptor: int, place: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, place)
        left, place = left[written:], place + written


def _reserve(descriptor: int, length: int) -> None:
    """Give a file its length and, where the system can, the room on the disk."""
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.truncate(descriptor, length)
