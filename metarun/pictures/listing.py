"""Which pictures a data set has: its classes, the pictures of each, and its splits."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from metarun.errors import DataError

SPLITS = ("train", "val", "test")


class Picture(NamedTuple):
    """Where a picture is."""

    file: str  # its file, or the archive that it is in
    member: str = ""  # its name within the archive

    def __str__(self) -> str:
        return f"{self.file} ({self.member})" if self.member else self.file


@dataclass(frozen=True)
class Listing:
    """The pictures of a data set. `listed` makes one, and checks it.

    Attributes:
        root: the folder that they are in.
        layout: how they lie there, in words.
        class_names: one name a class.
        pictures: those of the first class, then those of the second, …
        sizes: number of pictures of each class.
        splits: the numbers of the classes of "train", "val" and "test"; None: there is no split.
        groups: what each class belongs to (a superclass); None: there are no groups.
    """

    root: Path
    layout: str
    class_names: tuple[str, ...]
    pictures: tuple[Picture, ...]
    sizes: tuple[int, ...]
    splits: dict[str, list[int]] | None = None
    groups: tuple[str, ...] | None = None


def listed(
    root: Path,
    layout: str,
    classes: Mapping[str, Sequence[Picture]],
    splits: Mapping[str, Iterable[str]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Listing:
    """The listing of classes and their pictures, in this order; of each class in sorted order.

    Args:
        root: the folder that they are in.
        layout: how they lie there, in words.
        classes: the pictures of each class, by its name.
        splits: the names of the classes of "train", "val" and "test", if there is a split.
        groups: the group of each class, if there are groups.

    Raises:
        DataError: names are the same but for their case or Unicode form, a class has no picture
            or the same one twice, or the split is none.
    """
    names = tuple(classes)
    if not names:
        raise DataError(f"{root} has no classes ({layout})")
    _refuse_same_names(root, names)
    numbered = None if splits is None else _numbered(root, names, splits)
    for name, own in classes.items():
        if not own:
            raise DataError(f"class {name!r} in {root} has no picture: add some, or leave it out")
        if len(set(own)) < len(own):
            raise DataError(f"class {name!r} in {root} has a picture twice: {_twice(own)}")
    return Listing(
        root,
        layout,
        names,
        tuple(picture for own in classes.values() for picture in sorted(own)),
        tuple(map(len, classes.values())),
        numbered,
        None if groups is None else tuple(groups[name] for name in names),
    )


def plain(name: str) -> str:
    """The name of a class in the form in which names are compared: another may look the same."""
    return unicodedata.normalize("NFC", name)


def fingerprint(listing: Listing) -> str:
    """A name for the state of the pictures: other classes, names, sizes or times give another.

    Raises:
        OSError: a picture is not there.
    """
    state = hashlib.sha256(repr((listing.class_names, listing.sizes)).encode(errors="replace"))
    archives: dict[str, str] = {}
    for file, member in listing.pictures:
        told = archives.get(file) if member else None
        if told is None:
            status = os.stat(file)
            told = f"{_below(file, listing.root)}\0{status.st_size}\0{status.st_mtime_ns}"
            if member:
                archives[file] = told
        state.update(f"{told}\0{member}\n".encode(errors="surrogateescape"))
    return state.hexdigest()


def names_below(listing: Listing) -> list[str]:
    """The names of the pictures, seen from the root."""
    return [
        _below(file, listing.root) + (f"/{member}" if member else "")
        for file, member in listing.pictures
    ]


def _below(file: str, root: Path) -> str:
    return file.removeprefix(f"{root}{os.sep}")


def _twice(own: Sequence[Picture]) -> Picture:
    ordered = sorted(own)
    return next(a for a, b in pairwise(ordered) if a == b)


def _refuse_same_names(root: Path, names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(plain(name).casefold(), name)
        if other != name:
            how = "case" if plain(name) != plain(other) else "Unicode form"
            raise DataError(
                f"classes {other!r} and {name!r} in {root} differ in nothing but their {how}: "
                "rename one, or put their pictures together"
            )


def _numbered(
    root: Path, names: Sequence[str], splits: Mapping[str, Iterable[str]]
) -> dict[str, list[int]]:
    numbers = {plain(name): number for number, name in enumerate(names)}
    owner: dict[int, str] = {}
    found: dict[str, list[int]] = {}
    for split in SPLITS:
        found[split] = []
        for name in splits[split]:
            number = numbers.get(plain(name))
            if number is None:
                raise DataError(
                    f"the {split} split has class {name!r}, of which {root} has nothing"
                )
            if number in owner:
                raise DataError(
                    f"class {name!r} in {root} is in the {owner[number]} split and in the {split} "
                    "split: a few-shot split has other classes in each"
                )
            owner[number] = split
            found[split].append(number)
        if not found[split]:
            raise DataError(f"the {split} split of {root} has no classes")
    return found


def bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The first picture of each class, and the first behind it."""
    ends = list(accumulate(sizes))
    return list(zip([0, *ends], ends, strict=False))
