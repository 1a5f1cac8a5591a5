"""Pictures that a table lists: CSV or JSON files beside them, in layouts that others write."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metarun.errors import DataError
from metarun.pictures.folders import pictures_in
from metarun.pictures.listing import SPLITS, Listing, Picture, listed
from metarun.system.untrusted import UntrustedError, read_text

MOST_BYTES = 2**30  # of a table
LABELS = "labels.csv"
META_ALBUM = ("FILE_NAME", "CATEGORY")
SUPER_CATEGORY = "SUPER_CATEGORY"
PLAIN = ("filename", "label")
CLOSER_LOOK = ("label_names", "image_names", "image_labels")
OF_SPLITS = {"train": "base.json", "val": "val.json", "test": "novel.json"}
EASY_SET = ("class_names", "class_roots")


def has_split_csv(root: Path) -> bool:
    """Whether there is a `train.csv`."""
    return (root / "train.csv").is_file()


def split_csv(root: Path, inside: str = "") -> Listing:
    """`train.csv`, `val.csv` and `test.csv` with `filename,label`; pictures in `images`.

    The layout of mini-ImageNet as Ravi and Larochelle 2017 published it.

    Args:
        root: the folder.
        inside: where the tables are in it.

    Raises:
        DataError: a table is missing or damaged, names a picture that is not there, or as `listed`.
    """
    classes: dict[str, list[Picture]] = {}
    splits: dict[str, dict[str, None]] = {}
    for split in SPLITS:
        own, path = splits.setdefault(split, {}), root / inside / f"{split}.csv"
        for name, label in _rows(path, PLAIN):
            own[label] = None
            classes.setdefault(label, []).append(_picture(root, name, path))
    return listed(root, "train.csv, val.csv and test.csv", classes, splits)


def has_labels_csv(root: Path) -> bool:
    """Whether there is a `labels.csv` with the columns `filename` and `label`."""
    return _has_columns(root / LABELS, PLAIN)


def labels_csv(root: Path) -> Listing:
    """`labels.csv` with `filename,label`; pictures in `images`. There is no split.

    Raises:
        DataError: as `split_csv`.
    """
    classes: dict[str, list[Picture]] = {}
    for name, label in _rows(root / LABELS, PLAIN):
        classes.setdefault(label, []).append(_picture(root, name, root / LABELS))
    return listed(root, LABELS, dict(sorted(classes.items())))


def has_meta_album(root: Path) -> bool:
    """Whether there is a `labels.csv` with the columns of Meta-Album."""
    return _has_columns(root / LABELS, META_ALBUM)


def meta_album(root: Path) -> Listing:
    """Meta-Album (Ullah et al. 2022): `labels.csv` and `images`; its super-categories are groups.

    Raises:
        DataError: a class has two super-categories, or as `split_csv`.
    """
    path = root / LABELS
    grouped = _has_columns(path, [*META_ALBUM, SUPER_CATEGORY])
    columns = [*META_ALBUM, SUPER_CATEGORY] if grouped else META_ALBUM
    classes: dict[str, list[Picture]] = {}
    groups: dict[str, str] = {}
    for name, label, *group in _rows(path, columns):
        classes.setdefault(label, []).append(_picture(root, name, path))
        if group and groups.setdefault(label, group[0]) != group[0]:
            raise DataError(
                f"{path}: category {label!r} is in {groups[label]!r} and in {group[0]!r}"
            )
    return listed(
        root, "Meta-Album", dict(sorted(classes.items())), groups=groups if grouped else None
    )


def has_closer_look(root: Path) -> bool:
    """Whether there is a `base.json`."""
    return (root / OF_SPLITS["train"]).is_file()


def closer_look(root: Path) -> Listing:
    """The JSON of Chen et al. 2019, "A closer look at few-shot classification".

    `base.json`, `val.json` and `novel.json` with `label_names`, `image_names` (whole paths) and
    `image_labels` (numbers of label names). Pictures that have moved are looked for below `root`.

    Raises:
        DataError: as `split_csv`.
    """
    classes: dict[str, list[Picture]] = {}
    splits: dict[str, dict[str, None]] = {}
    for split, file in OF_SPLITS.items():
        path, own = root / file, splits.setdefault(split, {})
        names, images, labels = _lists(path, CLOSER_LOOK)
        if len(images) != len(labels):
            raise DataError(f"{path} has {len(images)} images, but {len(labels)} labels")
        found = _moved(root, path, images)
        for image, label in zip(found, labels, strict=True):
            if type(label) is not int or not 0 <= label < len(names):
                raise DataError(f"{path}: label {label!r} is no number of its {len(names)} names")
            own[str(names[label])] = None
            classes.setdefault(str(names[label]), []).append(Picture(image))
    return listed(root, "base.json, val.json and novel.json", classes, splits)


def has_easy_set(root: Path) -> bool:
    """Whether there is a `train.json`."""
    return (root / "train.json").is_file()


def easy_set(root: Path) -> Listing:
    """The JSON of easyfsl's EasySet: `train.json`, `val.json` and `test.json`.

    Each has `class_names` and `class_roots`, the folders of the classes. Folders that have moved
    are looked for below `root`.

    Raises:
        DataError: as `split_csv`.
    """
    classes: dict[str, list[Picture]] = {}
    splits: dict[str, list[str]] = {}
    for split in SPLITS:
        path = root / f"{split}.json"
        names, roots = _lists(path, EASY_SET)
        if len(names) != len(roots):
            raise DataError(f"{path} has {len(names)} names of classes, but {len(roots)} folders")
        splits[split] = [str(name) for name in names]
        for name, folder in zip(splits[split], _moved(root, path, roots), strict=True):
            classes.setdefault(name, []).extend(pictures_in(folder))
    return listed(root, "train.json, val.json and test.json", classes, splits)


def _has_columns(path: Path, columns: Sequence[str]) -> bool:
    if not path.is_file():
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = next(csv.reader([file.readline(2**16)]), [])
    return set(columns) <= set(first)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[list[str]]:
    """The values of some columns, row by row."""
    lines = csv.reader(_text(path).removeprefix("\ufeff").splitlines())
    try:
        first = next(lines, [])
        if missing := [name for name in columns if name not in first]:
            raise DataError(
                f"{path} has the columns {', '.join(first) or 'of no name'}, but no {missing[0]}: "
                f"it must have {', '.join(columns)}"
            )
        places = [first.index(name) for name in columns]
        for number, line in enumerate(lines, start=2):
            if line:
                try:
                    yield [line[place] for place in places]
                except IndexError as error:
                    raise DataError(f"{path}: line {number} is too short") from error
    except csv.Error as error:
        raise DataError(f"{path} is no table: {error}") from error


def _picture(root: Path, name: str, table: Path) -> Picture:
    """A picture that a table names, in `images` or beside the table."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{table} names {name!r}, which is not below {root}")
    inside = root / "images"
    return Picture(str((inside if inside.is_dir() else root) / name))


def _lists(path: Path, keys: Sequence[str]) -> list[list[Any]]:
    try:
        if not path.exists():
            raise DataError(f"{path} is missing")
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    for key in keys:
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            raise DataError(f"{path} has no list {key!r}: it must have {', '.join(keys)}")
    return [found[key] for key in keys]


def _moved(root: Path, table: Path, paths: Sequence[Any]) -> list[str]:
    """Paths as a table has them, or below `root` where they have moved there: all the same way."""
    if not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"{table} has paths that are no words")
    if not paths:
        return []
    first = Path(paths[0])
    if first.is_absolute() and first.exists():
        return list(paths)
    for left_out in range(first.is_absolute(), len(first.parts)):
        if root.joinpath(*first.parts[left_out:]).exists():
            return [str(root.joinpath(*Path(path).parts[left_out:])) for path in paths]
    if first.exists():  # from the current folder
        return [str(Path(path).absolute()) for path in paths]
    raise DataError(
        f"{table} names {paths[0]}, which is not there, nor is its end below {root}: put the "
        "pictures where it says, or below the folder of the table"
    )


def _text(path: Path) -> str:
    try:
        return read_text(path, MOST_BYTES)
    except UntrustedError as error:
        raise DataError(f"{path.parent}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
