"""CUB: 200 species of birds, 11,788 pictures. Two splits are in use, which must not be mixed up.

References:
    Wah et al. 2011, The Caltech-UCSD Birds-200-2011 dataset (the pictures).
    Chen et al. 2019, A closer look at few-shot classification (100/50/50).
    Triantafillou et al. 2020, Meta-Dataset (140/30/30).
"""

from typing import Literal

import torch

from metarun.components.data._benchmarks import BenchmarkConfig, load_benchmark, whereabouts
from metarun.components.data._class_lists import ClassList, class_list
from metarun.components.data._finding import Benchmark
from metarun.components.data._layouts import (
    CLOSER_LOOK,
    EASY_SET,
    in_class_folders,
    in_split_folders,
)
from metarun.components.data.images import image_episodes
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore

TOTAL = 11_788
SHA256 = {
    "100-50-50": "feb3c77c318db9d7dfe65d05354feddb87fbaea2334a02d364c9c283da992b7d",
    "140-30-30": "b011ee08d24ed2de30accad7c85985e6541be2fe5430f67109e3b2ad0906b633",
}

LayoutName = Literal["auto", "classes", "splits", "closer_look", "easy_set"]


@settings
class CubConfig(BenchmarkConfig):
    """CUB (Wah et al. 2011): 200 species of birds, 11,788 pictures."""

    layout: LayoutName = "auto"  # how its files lie; auto: as it looks
    split: Literal["100-50-50", "140-30-30"] = "100-50-50"  # Chen et al. 2019, or Meta-Dataset


@builds(CubConfig)
def cub(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: CubConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(CubConfig)
def found(own: CubConfig) -> str:
    """Where the pictures are."""
    return whereabouts(published(own.split), own)


def load(own: CubConfig) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once.
    """
    return load_benchmark(published(own.split), own)


def published(split: str, classes: ClassList | None = None, total: int = TOTAL) -> Benchmark:
    """What is published: the classes of a split, and the layouts in which they are about."""
    classes = classes or class_list(f"cub_{split.replace('-', '_')}", SHA256[split])
    every = [name for own in classes.splits.values() for name in own]
    return Benchmark(
        name="cub",
        title=f"CUB-200-2011 (data.split={split})",
        folders=("CUB_200_2011", "cub", "cub-200", "cubirds200"),
        inner=("CUB_200_2011", "CUB_200_2011/images", "images"),
        splits=classes.splits,
        total=total,
        layouts={
            "classes": in_class_folders("CUB_200_2011/images/<class>/*.jpg", every),
            "splits": in_split_folders("{train,val,test}/<class>/*.jpg", every),
            "closer_look": CLOSER_LOOK,
            "easy_set": EASY_SET,
        },
        source="It is CUB_200_2011.tgz (1.1 GB) of Caltech: docs/benchmarks.md says where.",
        aliases={name.partition(".")[2]: name for name in every},  # some leave the number out
    )
