"""Pictures that are parts of a larger file: the pixels in an array, or files within a pickle.

A part is a `Picture` whose member says what it is and where: "rgb@<offset>+<bytes> <side>".
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metarun.errors import DataError
from metarun.pictures.convert import read_pixels
from metarun.pictures.decode import Pixels, Preprocessing, UnreadableError, open_picture, to_pixels
from metarun.pictures.listing import Picture
from metarun.system.pickled_arrays import Array, Span

MEMBER = re.compile(r"(rgb|bgr|planes|file)@(\d+)\+(\d+) (\d+)")


def part(path: Path, kind: str, offset: int, length: int, side: int) -> Picture:
    """A part of a file.

    Args:
        path: the file.
        kind: "rgb" or "bgr", the pixels row by row; "planes", all that is red, then green, then
            blue; "file", a PNG or another format of Pillow.
        offset: the first byte.
        length: bytes.
        side: pixels of its height and width.
    """
    return Picture(str(path), f"{kind}@{offset:012d}+{length} {side}")  # sorted as they lie


def read_part(picture: Picture, how: Preprocessing, side: int | None = None) -> Pixels:
    """The pixels of a part, or of a picture in a file of its own.

    Args:
        picture: which.
        how: what is done to it.
        side: pixels of height and width that a file of its own must have, if it must.

    Raises:
        UnreadableError: it is damaged, or of another size.
    """
    match = MEMBER.fullmatch(picture.member)
    if match is None and side is None:
        return read_pixels(picture, how)
    if match is None:
        content, kind = Path(picture.file).read_bytes(), "file"
    else:
        kind, side = match[1], int(match[4])
        with open(picture.file, "rb") as file:
            file.seek(int(match[2]))
            content = file.read(int(match[3]))
    assert side is not None
    if kind == "file":
        image = open_picture(content)
        if image.size != (side, side):
            raise UnreadableError(f"it has {image.width}x{image.height} pixels, not {side}x{side}")
        return to_pixels(image, how)
    pixels = np.frombuffer(content, np.uint8)
    if len(pixels) != 3 * side * side:
        raise UnreadableError("the file is cut short")
    if kind == "planes":
        pixels = pixels.reshape(3, side, side).transpose(1, 2, 0)
    else:
        pixels = pixels.reshape(side, side, 3)[:, :, :: 1 if kind == "rgb" else -1]
    return to_pixels(Image.fromarray(np.ascontiguousarray(pixels)), how)


def pixel_parts(path: Path, images: Any, side: int, kind: str = "rgb") -> list[Picture]:
    """The pictures of an array (pictures, side, side, 3) of a pickle, or of a list of such arrays.

    Raises:
        DataError: they have another shape or type.
        UntrustedError: their bytes are not in the file as they are.
    """
    shape = (3 * side * side,) if kind == "planes" else (side, side, 3)
    if isinstance(images, Array):
        if images.shape[1:] != shape or images.dtype != np.uint8:
            wanted = (*images.shape[:1], *shape)
            raise DataError(_wrong(path, images.shape, images.dtype, wanted))
        return list(rows(path, images.place, images.shape[0], side, kind))
    if not isinstance(images, list):
        raise DataError(f"{path}: its pictures are no array")
    found: list[Picture] = []
    for image in images:
        if not isinstance(image, Array):
            raise DataError(f"{path}: picture {len(found)} is no array")
        if image.shape != shape or image.dtype != np.uint8:
            raise DataError(_wrong(path, image.shape, image.dtype, shape))
        found += rows(path, image.place, 1, side, kind)
    return found


def rows(path: Path, place: Span, count: int, side: int, kind: str) -> Iterator[Picture]:
    """The pictures of an array of bytes that begins at a place in a file."""
    size = 3 * side * side
    return (part(path, kind, place.offset + row * size, size, side) for row in range(count))


def file_parts(path: Path, images: Any, side: int) -> list[Picture]:
    """The pictures of a list of arrays, each of which has the bytes of a file.

    Raises:
        DataError: they are something else.
        UntrustedError: their bytes are not in the pickle as they are.
    """
    if not isinstance(images, list):
        raise DataError(f"{path}: its pictures are no list")
    found: list[Picture] = []
    for image in images:
        if not isinstance(image, Array) or image.dtype != np.uint8:
            raise DataError(f"{path}: picture {len(found)} is no file of bytes")
        found.append(part(path, "file", image.place.offset, image.place.length, side))
    return found


def by_class(
    pictures: Sequence[Picture], labels: Sequence[int], names: Mapping[int, str]
) -> dict[str, list[Picture]]:
    """The pictures of each class, from the number of the class of each, and its name."""
    found: dict[str, list[Picture]] = {name: [] for name in names.values()}
    for picture, label in zip(pictures, labels, strict=True):
        found[names[label]].append(picture)
    return found


def _wrong(path: Path, shape: object, dtype: object, wanted: object) -> str:
    return f"{path}: has pictures of shape {shape} ({dtype}), which should be {wanted} (uint8)"
