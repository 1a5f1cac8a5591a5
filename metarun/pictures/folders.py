"""Pictures in class folders: one folder per class, or such folders for each split."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metarun.errors import DataError, printable_name
from metarun.pictures.decode import extensions
from metarun.pictures.listing import SPLITS, Listing, Picture, listed

log = logging.getLogger(__name__)

NAMES_OF_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
JUNK = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})
"""What systems put beside pictures, apart from names that begin with a point."""


class Content(NamedTuple):
    """What is in a folder: names, sorted."""

    pictures: list[str]
    folders: list[str]
    others: list[str]
    hidden: list[str]  # folders whose names begin with a point


def content_of(folder: str | Path) -> Content:
    """What is in a folder; what systems leave in it does not count.

    Raises:
        DataError: it cannot be read.
    """
    found = Content([], [], [], [])
    known = extensions()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name in JUNK:
                    if name.startswith(".") and _is_folder(entry):
                        found.hidden.append(name)
                    continue
                if _is_folder(entry):
                    found.folders.append(name)
                elif os.path.splitext(name)[1].lower() in known:
                    found.pictures.append(name)
                else:
                    found.others.append(name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    for names in found:
        names.sort()
    return found


def pictures_in(folder: str | Path) -> list[Picture]:
    """The pictures of a class folder; what else is in it is named in the log.

    Raises:
        DataError: it cannot be read.
    """
    content = content_of(folder)
    if left_out := [*(f"{name}/" for name in content.folders), *content.others]:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        first = printable_name(left_out[0])
        log.info(
            "%s: %s%s is left out: no picture by its name", printable_name(folder), first, more
        )
    return [Picture(os.path.join(folder, name)) for name in content.pictures]


def classes_in(folder: Path) -> dict[str, list[Picture]]:
    """The pictures of each class folder in `folder`, by its name.

    Raises:
        DataError: a folder cannot be read.
    """
    content = content_of(folder)
    if loose := [*content.pictures, *content.others]:
        log.info("%s: %d files outside of class folders are left out", folder, len(loose))
    for name in content.hidden:
        if content_of(folder / name).pictures:
            log.warning(
                "%s: %s is left out: no class has a name that begins with a point",
                printable_name(folder), printable_name(name),
            )  # fmt: skip
    return {name: pictures_in(folder / name) for name in content.folders}


def has_class_folders(root: Path) -> bool:
    """Whether two folders or more in `root` have pictures in them, and none is of a split."""
    folders = content_of(root).folders
    if any(folder in names for names in NAMES_OF_SPLITS.values() for folder in folders):
        return False
    with_pictures = (True for name in folders if content_of(root / name).pictures)
    return next(with_pictures, False) and next(with_pictures, False)


def class_folders(root: Path) -> Listing:
    """`root/<class>/<picture>`; there is no split.

    Raises:
        DataError: as `listed`.
    """
    return listed(root, "class folders", classes_in(root))


def has_split_folders(root: Path) -> bool:
    """Whether `root` has a folder for training, and another for validation or test."""
    found = [_split_folder(root, split) is not None for split in SPLITS]
    return found[0] and any(found[1:])


def split_folders(root: Path) -> Listing:
    """`root/{train,val,test}/<class>/<picture>`.

    Raises:
        DataError: a split is missing or has no class folders, or as `listed`.
    """
    classes: dict[str, list[Picture]] = {}
    splits: dict[str, Sequence[str]] = {}
    for split in SPLITS:
        folder = _split_folder(root, split)
        if folder is None:
            if hint := wrong_case(root):
                raise DataError(f"{root} has no folder {split}: {hint}")
            raise DataError(
                f"{root} has no folder {split}: move some class folders into one, or put all class "
                "folders into one folder, and they are split by data.split_seed"
            )
        own = classes_in(folder)
        if not own:
            raise DataError(f"{folder} has no class folders: pictures lie in {folder}/<class>/")
        splits[split] = list(own)
        for name, pictures in own.items():
            classes.setdefault(name, []).extend(pictures)
    return listed(root, "class folders in split folders", classes, splits)


def wrong_case(root: Path) -> str:
    """What to do about folders of splits whose names have capitals; empty: there are none."""
    known = {name for names in NAMES_OF_SPLITS.values() for name in names}
    there = content_of(root).folders
    found = [name for name in there if name not in known and name.lower() in known]
    if not found:
        return ""
    right = ", ".join(name.lower() for name in found)
    return f"folders of splits are in lower case: call {', '.join(found)} {right}"


def too_deep(root: Path) -> str:
    """What to do about class folders that lie in folders of `root`; empty: there are none."""
    above = content_of(root).folders
    for name in above:
        for inner in content_of(root / name).folders:
            if content_of(root / name / inner).pictures:
                text = f"pictures lie one level deeper, as in {name}/{inner}/: "
                if len(above) == 1:
                    return f"{text}give data.root={root / name}"
                return f"{text}move all class folders, such as {inner}, into {root} itself"
    return ""


def _split_folder(root: Path, split: str) -> Path | None:
    found = [root / name for name in NAMES_OF_SPLITS[split] if (root / name).is_dir()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} are both of the {split} split: keep one")
    return found[0] if found else None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
