"""FC100: the 100 classes of CIFAR-100, whose 20 superclasses the splits do not share, 32x32.

References:
    Oreshkin et al. 2018, TADAM: Task dependent adaptive metric for improved few-shot learning.
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

SHA256 = "409ebfd49c19f2287bfffe7b9966616269c5b8745ce43cb4bf8e605bf50206ab"


@settings
class Fc100Config(Cifar100Config):
    """FC100 (Oreshkin et al. 2018): CIFAR-100 in 60/20/20 classes, by superclass."""


@builds(Fc100Config)
def fc100(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: Fc100Config
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(Fc100Config)
def found(own: Fc100Config) -> str:
    """Where the pictures are."""
    return whereabouts(published(), own)


def load(own: Fc100Config) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once.
    """
    return load_or_download(published(), own)


def published(classes: ClassList | None = None, per_class: int = PER_CLASS) -> Benchmark:
    """What is published: the classes, and the layouts in which they are about."""
    classes = classes or class_list("fc100", SHA256)
    files = "FC100_{}.pickle"
    return benchmark_of("fc100", "FC100", ("fc100",), files, classes, per_class)
