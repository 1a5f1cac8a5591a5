"""How pictures lie in a folder: found out, never guessed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from metarun.errors import ConfigError, DataError
from metarun.pictures import folders, tables
from metarun.pictures.listing import Listing

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """A way in which pictures lie in a folder.

    Attributes:
        what: what it consists of, in words.
        fits: whether a folder looks like it.
        read: the pictures of such a folder.
    """

    what: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], Listing]


LAYOUTS = {
    "splits": Layout(
        "train/<class>/*, val/<class>/*, test/<class>/*",
        folders.has_split_folders,
        folders.split_folders,
    ),
    "classes": Layout("<class>/*", folders.has_class_folders, folders.class_folders),
    "csv": Layout(
        "train.csv, val.csv, test.csv (filename,label) and images/",
        tables.has_split_csv,
        tables.split_csv,
    ),
    "labels": Layout(
        "labels.csv (filename,label) and images/", tables.has_labels_csv, tables.labels_csv
    ),
    "meta_album": Layout(
        "labels.csv (FILE_NAME,CATEGORY) and images/, as Meta-Album",
        tables.has_meta_album,
        tables.meta_album,
    ),
    "closer_look": Layout(
        "base.json, val.json, novel.json, as A Closer Look at Few-shot Classification",
        tables.has_closer_look,
        tables.closer_look,
    ),
    "easy_set": Layout(
        "train.json, val.json, test.json, as easyfsl's EasySet",
        tables.has_easy_set,
        tables.easy_set,
    ),
}


def list_pictures(root: Path, layout: str = "auto") -> Listing:
    """The pictures in a folder, in the one layout that it has.

    Args:
        root: the folder.
        layout: one of `LAYOUTS`, or "auto".

    Raises:
        DataError: there is no such folder, it has none of the layouts, or its pictures are not as
            the layout says.
        ConfigError: it has several.
    """
    if not root.is_dir():
        raise DataError(f"data.root={root}: there is no such folder")
    if layout != "auto":
        return LAYOUTS[layout].read(root)
    found = [name for name, one in LAYOUTS.items() if one.fits(root)]
    if len(found) > 1:
        choices = " and ".join(f"{LAYOUTS[name].what} (data.layout={name})" for name in found)
        raise ConfigError(f"{root} has {choices}: say which with data.layout=…")
    if not found:
        raise DataError(_nothing(root))
    listing = LAYOUTS[found[0]].read(root)
    log.info("%s: %s", root, describe(listing))
    return listing


def describe(listing: Listing) -> str:
    """How many pictures there are, in how many classes, and how they lie."""
    split = ""
    if listing.splits is not None:
        counts = ", ".join(f"{len(own)} {name}" for name, own in listing.splits.items())
        split = f" ({counts})"
    return (
        f"{len(listing.pictures):,} pictures of {len(listing.class_names):,} classes{split}, by "
        f"{listing.layout}"
    )


def _nothing(root: Path) -> str:
    """What was looked for, and what is there."""
    content = folders.content_of(root)
    there = [f"{name}/" for name in content.folders] + content.pictures + content.others
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    layouts = "".join(f"\n  {layout.what}" for layout in LAYOUTS.values())
    if hint := folders.wrong_case(root) or folders.too_deep(root):
        hint = f"{hint}.\n"
    return (
        f"the pictures in {root} lie in no layout that metarun knows. It has: "
        f"{shown or 'nothing'}.\n{hint}"
        f"Any of these is read:{layouts}\n"
        "Pictures are known by the ends of their names (.jpg, .png, …)."
    )
