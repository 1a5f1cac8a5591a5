"""The layouts in which published data sets lie on disks: folders, tables, pickles, arrays."""

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarun.errors import DataError
from metarun.pictures.folders import class_folders, split_folders
from metarun.pictures.listing import SPLITS, Listing, Picture, listed
from metarun.pictures.tables import closer_look, easy_set, split_csv
from metarun.system.pickled_arrays import Array
from metarun.system.plain_pickle import read_pickle
from metarun.system.untrusted import UntrustedError


class Layout(NamedTuple):
    """A way in which a data set lies on disks.

    Attributes:
        what: what it consists of, in words.
        files: the files that hold its pictures, in a folder; none if it is not there.
        read: the pictures of such a folder.
        extras: whether classes beyond those of the data set are no mistake.
    """

    what: str
    files: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], Listing]
    extras: bool = False


def in_class_folders(what: str, names: Sequence[str], extras: bool = False) -> Layout:
    """A folder for each class.

    Args:
        what: the layout in words.
        names: of the folders of some classes. One that is called like a split (CIFAR-100 has a
            class `train`) does not count.
        extras: see `Layout`.
    """
    telling = [name for name in names if name not in SPLITS]
    return Layout(
        what,
        lambda home: [home] if any((home / name).is_dir() for name in telling) else [],
        class_folders,
        extras,
    )


def in_split_folders(what: str, names: Sequence[str]) -> Layout:
    """A folder for each split, with a folder for each of its classes."""
    return Layout(
        what,
        lambda home: [home] if any((home / "train" / name).is_dir() for name in names) else [],
        split_folders,
    )


def in_tables(what: str) -> Layout:
    """`{train,val,test}.csv` beside `images`, or in the folder `split` or `splits`."""

    def place(home: Path) -> list[str]:
        return [part for part in ("", "split", "splits") if (home / part / "train.csv").is_file()]

    return Layout(
        what,
        lambda home: [home] if place(home) and (home / "images").is_dir() else [],
        lambda home: split_csv(home, place(home)[0]),
    )


CLOSER_LOOK = Layout(
    "base.json, val.json and novel.json, of A Closer Look at Few-shot Classification",
    lambda home: [home] if (home / "base.json").is_file() else [],
    closer_look,
)
EASY_SET = Layout(
    "train.json, val.json and test.json, of easyfsl",
    lambda home: [home] if (home / "train.json").is_file() else [],
    easy_set,
)


def in_files(
    what: str, patterns: Sequence[str], read: Callable[[str, list[Path]], dict[str, list[Picture]]]
) -> Layout:
    """Files for each split.

    Args:
        what: the layout in words.
        patterns: names of the files of a split, with {} for the split; several names of one file
            are separated by "|".
        read: gives the pictures of each class of a split, from its name and its files.
    """

    def files(home: Path) -> list[Path]:
        there = [_first(home, pattern, split) for split in SPLITS for pattern in patterns]
        return (
            [path for path in there if path.is_file()]
            if any(_first(home, pattern, "train").is_file() for pattern in patterns[:1])
            else []
        )

    def list_all(home: Path) -> Listing:
        classes: dict[str, list[Picture]] = {}
        splits: dict[str, list[str]] = {}
        for split in SPLITS:
            paths = [_first(home, pattern, split) for pattern in patterns]
            if lost := [path for path in paths if not path.is_file()]:
                raise DataError(f"{lost[0]} is missing")
            own = read(split, paths)
            splits[split] = list(own)
            for name, pictures in own.items():
                classes.setdefault(name, []).extend(pictures)
        return listed(home, what, classes, splits)

    return Layout(what, files, list_all)


def _first(home: Path, pattern: str, split: str) -> Path:
    """The file of a split: the first of its names that is there."""
    names = [name.replace("{}", split) for name in pattern.split("|")]
    if split == "val":
        names += [name.replace("{}", "validation") for name in pattern.split("|") if "{}" in name]
    return next((home / name for name in names if (home / name).is_file()), home / names[0])


def plain(path: Path) -> Any:
    """What is in a pickle.

    Raises:
        DataError: it is damaged, or would make objects.
    """
    try:
        return read_pickle(path)
    except UntrustedError as error:
        raise DataError(f"{path.parent}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def record(path: Path, *keys: str) -> list[Any]:
    """The values of some keys of the dictionary in a pickle.

    Raises:
        DataError: there is none, or it has no such keys.
    """
    found = plain(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no dictionary: it should have {', '.join(keys)}")
    for key in keys:
        if key not in found:
            raise DataError(
                f"{path} has {', '.join(map(str, found)) or 'nothing'}, but no {key}: it should "
                f"have {', '.join(keys)}"
            )
    return [found[key] for key in keys]


def numbers_of(
    path: Path, values: Any, known: Container[int], what: str = "class of this split"
) -> list[int]:
    """A list or an array of whole numbers.

    Args:
        path: of the file that they are from.
        values: the list.
        known: the numbers that there are.
        what: they are the numbers of.

    Raises:
        DataError: it is no such list, or has other numbers.
    """
    try:
        found = values.numpy() if isinstance(values, Array) else np.asarray(values)
    except ValueError as error:
        raise DataError(f"{path}: a {what} has no whole number") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(f"{path}: a {what} has no whole number")
    numbers: list[int] = found.tolist()
    if unknown := sorted(number for number in {*numbers} if number not in known):
        raise DataError(f"{path}: no {what} has number {unknown[0]}")
    return numbers


def labels_of(path: Path, values: Any, count: int, known: Container[int]) -> list[int]:
    """The number of the class of each picture.

    Args:
        path, values, known: as `numbers_of` has them.
        count: of the pictures.

    Raises:
        DataError: as `numbers_of`, or they are not as many as the pictures.
    """
    numbers = numbers_of(path, values, known)
    if len(numbers) != count:
        raise DataError(f"{path} has {len(numbers)} labels for {count} pictures")
    return numbers
