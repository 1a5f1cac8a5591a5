"""tiered-ImageNet: 608 classes of ImageNet in 34 superclasses that no two splits share; 84x84.

References:
    Ren et al. 2018, Meta-learning for semi-supervised few-shot classification.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metarun.components.data._benchmarks import BenchmarkConfig, load_benchmark, whereabouts
from metarun.components.data._class_lists import ClassList, class_list
from metarun.components.data._finding import Benchmark
from metarun.components.data._layouts import (
    in_class_folders,
    in_files,
    in_split_folders,
    labels_of,
    plain,
    record,
)
from metarun.components.data._npz import array_in_npz
from metarun.components.data._parts import by_class, file_parts, rows
from metarun.components.data.images import image_episodes
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore
from metarun.errors import ConfigError, DataError
from metarun.pictures.listing import Picture

SIDE = 84  # pixels, of the pictures in pickles
TOTAL = 779_165
SHA256 = "55864200cedaebc24cebae19e2027f589b975dcd3e1785baed5f0c329c99c550"

LayoutName = Literal["auto", "png", "npz", "splits", "classes"]
Read = Callable[[str, list[Path]], dict[str, list[Picture]]]


@settings
class TieredImagenetConfig(BenchmarkConfig):
    """tiered-ImageNet (Ren et al. 2018): 351/97/160 classes, 779,165 pictures."""

    layout: LayoutName = "auto"  # how its files lie; auto: as it looks
    npz_channels: Literal["unknown", "rgb", "bgr"] = "unknown"  # order of an .npz; OpenCV's is bgr


@builds(TieredImagenetConfig)
def tiered_imagenet(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: TieredImagenetConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(TieredImagenetConfig)
def found(own: TieredImagenetConfig) -> str:
    """Where the pictures are."""
    return whereabouts(published(npz_channels=own.npz_channels), own)


def load(own: TieredImagenetConfig) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once, or the order of channels is not known.
    """
    return load_benchmark(published(npz_channels=own.npz_channels), own)


def published(
    classes: ClassList | None = None, total: int = TOTAL, npz_channels: str = "unknown"
) -> Benchmark:
    """What is published: the classes, and the layouts in which they are about.

    Args:
        classes: those that make it complete, by default the published ones.
        total: pictures that make it complete.
        npz_channels: see the settings.
    """
    classes = classes or class_list("tiered_imagenet", SHA256)
    train = [name.split("/")[-1] for name in classes.splits["train"]]
    return Benchmark(
        name="tiered_imagenet",
        title="tiered-ImageNet",
        folders=("tiered-imagenet", "tiered-imagenet-npz"),
        inner=("tiered-imagenet", "tiered_imagenet", "data"),
        splits=classes.splits,
        total=total,
        layouts={
            "png": in_files(
                "{train,val,test}_images_png.pkl and {train,val,test}_labels.pkl",
                ["{}_images_png.pkl", "{}_labels.pkl"],
                read_png(classes),
            ),
            "npz": in_files(
                "{train,val,test}_images.npz (images) and {train,val,test}_labels.pkl",
                ["{}_images.npz", "{}_labels.pkl"],
                read_npz(classes, npz_channels),
            ),
            "splits": in_split_folders("{train,val,test}/<WordNet id>/*", train),
            "classes": in_class_folders(
                "<WordNet id>/* of ImageNet 2012 (its training pictures)", train, extras=True
            ),
        },
        source="It is made of ImageNet, whose terms forbid to pass it on: docs/benchmarks.md says "
        "where people get it.",
    )


def read_png(classes: ClassList) -> Read:
    """What reads a split of Ren et al. 2018: a pickled list of PNG files, and their labels."""

    def read(split: str, files: list[Path]) -> dict[str, list[Picture]]:
        images, labels = files
        pictures = file_parts(images, plain(images), SIDE)
        return _by_labels(classes, split, labels, pictures)

    return read


def read_npz(classes: ClassList, channels: str) -> Read:
    """What reads a split that the code of Ren et al. 2018 has decoded into one array."""

    def read(split: str, files: list[Path]) -> dict[str, list[Picture]]:
        images, labels = files
        if channels == "unknown":
            raise ConfigError(
                f"{images} does not say whether its channels are RGB or BGR: "
                "data.npz_channels=bgr if OpenCV has made it (as decompress of few-shot-ssl does), "
                "else data.npz_channels=rgb"
            )
        shape, dtype, place = array_in_npz(images, "images")
        if shape[1:] != (SIDE, SIDE, 3) or dtype != np.uint8:
            raise DataError(
                f"{images}: has pictures of shape {shape} ({dtype}), which should be "
                f"{(*shape[:1], SIDE, SIDE, 3)} (uint8)"
            )
        pictures = list(rows(images, place, shape[0], SIDE, channels))
        return _by_labels(classes, split, labels, pictures)

    return read


def _by_labels(
    classes: ClassList, split: str, path: Path, pictures: list[Picture]
) -> dict[str, list[Picture]]:
    """The pictures of each class of a split.

    A labels file numbers the classes of its split, and has their words: they say which is which.
    The superclasses are those of the published list.
    """
    labels, words = record(path, "label_specific", "label_specific_str")
    names = _names(classes, split, path, words)
    return by_class(pictures, labels_of(path, labels, len(pictures), names), names)


def _names(classes: ClassList, split: str, path: Path, words: Any) -> Mapping[int, str]:
    known = {classes.words[name]: name for name in classes.splits[split]}
    known |= {name.split("/")[-1]: name for name in classes.splits[split]}  # some write the ids
    if not isinstance(words, list):
        raise DataError(f"{path}: label_specific_str is no list")
    if unknown := [word for word in words if word not in known]:
        raise DataError(f"{path}: {unknown[0]!r} is no class of the {split} split")
    return {number: known[word] for number, word in enumerate(words)}
