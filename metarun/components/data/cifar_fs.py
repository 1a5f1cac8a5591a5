"""CIFAR-FS: the 100 classes of CIFAR-100 in a random split, 32x32.

References:
    Bertinetto et al. 2019, Meta-learning with differentiable closed-form solvers (the split).
    Krizhevsky 2009, Learning multiple layers of features from tiny images (CIFAR-100).
"""

import torch

from metarun.components.data._benchmarks import whereabouts
from metarun.components.data._cifar100 import (
    PER_CLASS,
    Cifar100Config,
    benchmark_of,
    load_or_download,
)
from metarun.components.data._class_lists import ClassList, class_list
from metarun.components.data._finding import Benchmark
from metarun.components.data.images import image_episodes
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore

SHA256 = "bea93c707a1d5745cf2d2ba9aec69cfc7ef3627186193915351d6099dfef4981"


@settings
class CifarFsConfig(Cifar100Config):
    """CIFAR-FS (Bertinetto et al. 2019): CIFAR-100 in 64/16/20 classes at random."""


@builds(CifarFsConfig)
def cifar_fs(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: CifarFsConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(CifarFsConfig)
def found(own: CifarFsConfig) -> str:
    """Where the pictures are."""
    return whereabouts(published(), own)


def load(own: CifarFsConfig) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once.
    """
    return load_or_download(published(), own)


def published(classes: ClassList | None = None, per_class: int = PER_CLASS) -> Benchmark:
    """What is published: the classes, and the layouts in which they are about."""
    classes = classes or class_list("cifar_fs", SHA256)
    files = "CIFAR_FS_{}.pickle"
    return benchmark_of("cifar_fs", "CIFAR-FS", ("cifar-fs",), files, classes, per_class)
