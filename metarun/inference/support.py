"""The pictures that a person gives: a few per class in folders, and those to be labelled."""

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metarun.errors import ConfigError, DataError, printable_name
from metarun.pictures.decode import UnreadableError, extensions
from metarun.pictures.folders import JUNK, class_folders, content_of
from metarun.pictures.inputs import Inputs
from metarun.pictures.listing import Listing, Picture

log = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """Examples of the classes of a task.

    Attributes:
        pixels: uint8 (examples, channels, height, width).
        labels: int64 (examples,), places in `class_names`.
        class_names: in sorted order.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many examples each class has."""
        found = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return dict(zip(self.class_names, found, strict=True))


def list_support(folder: Path) -> Listing:
    """The pictures of `folder/<class>/`.

    Raises:
        ConfigError: there is no such folder, or it has no two class folders.
        DataError: a class has no picture, or the names of two look the same.
    """
    if not folder.is_dir():
        raise ConfigError(f"support={folder}: there is no such folder")
    content = content_of(folder)
    if len(content.folders) < 2:
        has = f"has the class {content.folders[0]!r} alone" if content.folders else "has none"
        raise ConfigError(
            f"support={folder} {has}: give two class folders or more with a few pictures each, "
            "<class>/<picture>"
        )
    return class_folders(folder)


def read_support(listing: Listing, inputs: Inputs, skip_unreadable: bool = False) -> Labelled:
    """The pixels of the pictures, and their classes.

    Raises:
        DataError: a picture cannot be read, or none of a class can.
    """
    numbers = np.repeat(np.arange(len(listing.sizes)), listing.sizes)
    pixels, kept = read_pictures(listing.pictures, inputs, skip_unreadable, "reading the support")
    labels = torch.from_numpy(numbers)[kept]
    support = Labelled(pixels, labels, listing.class_names)
    if lost := [name for name, count in support.counts.items() if not count]:
        raise DataError(
            f"class {lost[0]!r} in {listing.root} has no picture that can be read: add some"
        )
    return support


def list_queries(given: str | Sequence[str]) -> list[str]:
    """The files of the pictures to be labelled.

    Args:
        given: a folder (with all folders below it), a file, a pattern such as `new/*.jpg`, or
            several of these.

    Raises:
        ConfigError: something is not there, or there is no picture.
    """
    found: list[str] = []
    for one in [given] if isinstance(given, str) else given:
        path = os.path.expanduser(str(one))
        if os.path.isdir(path):
            found += _below(path)
        elif os.path.exists(path):
            found.append(path)
        elif matches := sorted(glob.glob(path, recursive=True)):
            found += [match for match in matches if os.path.isfile(match)]
        else:
            raise ConfigError(f"query={one}: there is no such folder or picture")
    if not found:
        raise ConfigError(
            f"query={given} has no pictures: they are known by the ends of their names (.jpg, "
            ".png, …)"
        )
    return list(dict.fromkeys(found))


def _below(folder: str) -> list[str]:
    """The pictures in a folder and in all below it, then those of linked folders, each once."""
    known, found = extensions(), []
    seen, waiting = set[str](), [folder]
    while waiting:
        # The walk follows no links itself: a folder is found by its own name, if it is below.
        for here, folders, names in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in JUNK)
            inside = [os.path.join(here, name) for name in folders]
            waiting += [path for path in inside if os.path.islink(path) and not _holds(path, real)]
            found += [
                os.path.join(here, name)
                for name in sorted(names)
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in known
            ]
    return found


def _holds(link: str, folder: str) -> bool:
    """Whether a link leads to a folder that holds another one, or is it: round in a circle."""
    target = os.path.realpath(link)
    return os.path.commonpath([target, folder]) == target


def read_pictures(
    pictures: Iterable[Picture], inputs: Inputs, skip_unreadable: bool = False, what: str = ""
) -> tuple[Tensor, list[int]]:
    """The pixels of pictures.

    Args:
        inputs: what is done to each.
        skip_unreadable: leave out what cannot be read, and name it in the log.
        what: shown beside a bar of progress; "" shows none.

    Returns:
        uint8 (pictures that were read, channels, height, width), and their places among all.

    Raises:
        DataError: a picture cannot be read.
    """
    pixels, kept = [], []
    shown = tqdm(list(pictures), desc=what, unit="picture", disable=None if what else True)
    for place, picture in enumerate(shown):
        try:
            pixels.append(inputs.of_file(picture))
            kept.append(place)
        except UnreadableError as error:
            if not skip_unreadable:
                raise DataError(
                    f"cannot read the picture {picture}: {error}. Mend or delete it, or leave out "
                    "what cannot be read with data.skip_unreadable=true"
                ) from error
            log.warning("left out %s: %s", printable_name(picture), error)
    if not pixels:
        return torch.empty((0, *inputs.shape), dtype=torch.uint8), kept
    return torch.from_numpy(np.stack(pixels)), kept
