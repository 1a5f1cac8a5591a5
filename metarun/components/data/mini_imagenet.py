"""mini-ImageNet: 100 classes of ImageNet, 600 pictures each, 84x84.

References:
    Vinyals et al. 2016, Matching networks for one shot learning (the data set).
    Ravi and Larochelle 2017, Optimization as a model for few-shot learning (classes and split).
"""

from pathlib import Path
from typing import Literal

import torch

from metarun.components.data._benchmarks import BenchmarkConfig, load_benchmark, whereabouts
from metarun.components.data._class_lists import ClassList, class_list
from metarun.components.data._finding import Benchmark
from metarun.components.data._layouts import (
    CLOSER_LOOK,
    in_class_folders,
    in_files,
    in_split_folders,
    in_tables,
    labels_of,
    numbers_of,
    record,
)
from metarun.components.data._parts import by_class, pixel_parts
from metarun.components.data.images import image_episodes
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore
from metarun.errors import DataError
from metarun.pictures.listing import Picture

SIDE = 84  # pixels, of the pictures in pickles
PER_CLASS = 600
SHA256 = "71b4b6d9e28f7a9810947d112acdfa74496ddec905018c9959aa592195d94354"

LayoutName = Literal["auto", "cache", "pickle", "csv", "splits", "classes", "closer_look"]


@settings
class MiniImagenetConfig(BenchmarkConfig):
    """mini-ImageNet (Vinyals et al. 2016): 64/16/20 classes of 600 pictures."""

    layout: LayoutName = "auto"  # how its files lie; auto: as it looks


@builds(MiniImagenetConfig)
def mini_imagenet(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: MiniImagenetConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(MiniImagenetConfig)
def found(own: MiniImagenetConfig) -> str:
    """Where the pictures are."""
    return whereabouts(published(), own)


def load(own: MiniImagenetConfig) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once.
    """
    return load_benchmark(published(), own)


def published(classes: ClassList | None = None, per_class: int = PER_CLASS) -> Benchmark:
    """What is published: the classes, and the layouts in which they are about."""
    classes = classes or class_list("mini_imagenet", SHA256)
    train = classes.splits["train"]
    return Benchmark(
        name="mini_imagenet",
        title="mini-ImageNet",
        folders=("mini-imagenet", "mini_imagenet_full_size"),
        inner=("miniimagenet", "mini-imagenet"),
        splits=classes.splits,
        per_class=per_class,
        layouts={
            "cache": in_files(
                "mini-imagenet-cache-{train,val,test}.pkl (image_data, class_dict)",
                ["mini-imagenet-cache-{}.pkl"],
                read_cache,
            ),
            "pickle": in_files(
                "miniImageNet_category_split_{train_phase_train,val,test}.pickle (data, labels)",
                [
                    "miniImageNet_category_split_{}.pickle|miniImageNet_category_split_{}_phase_{}.pickle"
                ],
                read_pickle_of_split,
            ),
            "csv": in_tables("{train,val,test}.csv (filename,label) and images/"),
            "splits": in_split_folders("{train,val,test}/<WordNet id>/*", train),
            "classes": in_class_folders("<WordNet id>/*", train),
            "closer_look": CLOSER_LOOK,
        },
        source="It is made of ImageNet, whose terms forbid to pass it on: docs/benchmarks.md says "
        "where people get it.",
    )


def read_cache(split: str, files: list[Path]) -> dict[str, list[Picture]]:
    """The pictures of a split of Ren et al. 2018, which learn2learn and torchmeta have taken over.

    Raises:
        DataError: the pickle is damaged, or holds something else.
    """
    (path,) = files
    images, classes = record(path, "image_data", "class_dict")
    pictures = pixel_parts(path, images, SIDE)
    if not isinstance(classes, dict):
        raise DataError(f"{path}: class_dict is no dictionary")
    found, every = {}, range(len(pictures))
    for name, numbers in classes.items():
        found[str(name)] = [pictures[n] for n in numbers_of(path, numbers, every, "picture")]
    return found


def read_pickle_of_split(split: str, files: list[Path]) -> dict[str, list[Picture]]:
    """The pictures of a split of Gidaris and Komodakis 2018, which MetaOptNet and RFS have.

    Raises:
        DataError: the pickle is damaged, or holds something else.
    """
    (path,) = files
    images, labels, numbers = record(path, "data", "labels", "catname2label")
    pictures = pixel_parts(path, images, SIDE)
    names = {number: str(name) for name, number in dict(numbers).items()}
    return by_class(pictures, labels_of(path, labels, len(pictures), names), names)
