"""Pictures of your own, in class folders or in any of the layouts of `metarun.pictures.layouts`."""

from dataclasses import field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from metarun.components.data.images import image_episodes
from metarun.components.data.pictures import PicturesConfig, preprocessing
from metarun.components.data.splits import seeded
from metarun.config.checks import absolute
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, split_stores
from metarun.errors import ConfigError
from metarun.pictures.convert import converted
from metarun.pictures.layouts import list_pictures

LayoutName = Literal[
    "auto", "splits", "classes", "csv", "labels", "meta_album", "closer_look", "easy_set"
]


@settings
class FolderConfig(PicturesConfig):
    """Pictures of your own: class folders, or a table of them."""

    own_root: ClassVar[bool] = True  # not the folder of all data sets

    root: str | None = None  # the folder
    layout: LayoutName = "auto"  # how the pictures lie in it; auto: as it looks
    split_seed: int = 0  # of the split by class, where the folder has none
    fractions: list[float] = field(default_factory=lambda: [0.64, 0.16, 0.2])  # of that split

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = absolute(self.root)
        parts = self.fractions
        if len(parts) != 3 or not all(0 < part < 1 for part in parts) or abs(sum(parts) - 1) > 1e-6:
            raise ConfigError(
                f"data.fractions={parts}: must be three numbers above 0 whose sum is 1, for "
                "training, validation and test"
            )


@builds(FolderConfig)
def folder(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: FolderConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


def load(own: FolderConfig) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        ConfigError: no folder is given, or it has too few classes.
        DataError: the pictures are missing, damaged or lie in no known layout.
    """
    if own.root is None:
        raise ConfigError("not given: data.root=<folder of pictures>")
    listing = list_pictures(Path(own.root), own.layout)
    splits = listing.splits
    if splits is None:
        if len(listing.class_names) < 3:
            raise ConfigError(
                f"{own.root} has {len(listing.class_names)} classes: each of three splits needs one"
            )
        splits = seeded(listing.class_names, own.split_seed, own.fractions)
    store = converted("folder", listing, preprocessing(own), skip_unreadable=own.skip_unreadable)
    return split_stores(store, splits)
