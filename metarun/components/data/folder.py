"""Pictures of your own, in class folders or in any of the layouts of `metarun.pictures.layouts`."""

from pathlib import Path
from typing import ClassVar, Literal

import torch

from metarun.components.data.images import image_episodes
from metarun.components.data.pictures import PicturesConfig, preprocessing
from metarun.components.data.split_by_class import SplitConfig, splits_of
from metarun.config.checks import absolute
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, split_stores
from metarun.errors import ConfigError
from metarun.pictures.convert import converted
from metarun.pictures.layouts import describe, list_pictures
from metarun.pictures.listing import Listing

LayoutName = Literal[
    "auto", "splits", "classes", "csv", "labels", "meta_album", "closer_look", "easy_set"
]


@settings
class FolderConfig(PicturesConfig, SplitConfig):
    """Pictures of your own: class folders, or a table of them."""

    own_root: ClassVar[bool] = True  # not the folder of all data sets

    root: str | None = None  # the folder of the pictures
    layout: LayoutName = "auto"  # how the pictures lie in it; auto: as it looks

    def __post_init__(self) -> None:
        PicturesConfig.__post_init__(self)
        SplitConfig.__post_init__(self)
        self.root = absolute(self.root)


@builds(FolderConfig)
def folder(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: FolderConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(FolderConfig)
def found(own: FolderConfig) -> str:
    """Which pictures there are, and how they lie."""
    return describe(_listing(own))


def load(own: FolderConfig) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        ConfigError: no folder is given, or it has too few classes.
        DataError: the pictures are missing, damaged or lie in no known layout.
    """
    listing = _listing(own)
    splits = splits_of(listing.class_names, own, listing.splits)
    store = converted("folder", listing, preprocessing(own), skip_unreadable=own.skip_unreadable)
    return split_stores(store, splits)


def _listing(own: FolderConfig) -> Listing:
    if own.root is None:
        raise ConfigError("not given: data.root=<folder of pictures>")
    return list_pictures(Path(own.root), own.layout)
