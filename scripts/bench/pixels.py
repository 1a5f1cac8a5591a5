"""Random images as a data set of metarun: the shapes of real ones, for timing alone."""

from dataclasses import dataclass

import torch

from metarun import components, compose
from metarun.config import TaskConfig
from metarun.data.episodes import ImageEpisodes
from metarun.data.store import from_equal_classes


@dataclass
class PixelsConfig:
    """Random pixels."""

    name: str = "pixels"
    channels: int = 3  # of an image
    side: int = 84  # pixels
    classes: int = 64
    images: int = 20  # of each class


def pixels(
    task: TaskConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    /,
    channels: int,
    side: int,
    classes: int,
    images: int,
) -> ImageEpisodes:
    """Episodes of random images, the same for the same seed.

    Raises:
        ValueError: the classes are too few or too small for the episodes.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (classes, images, channels, side, side)
    drawn = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    store = from_equal_classes(drawn, [str(index) for index in range(classes)])
    return ImageEpisodes(
        {"train": store, "val": store, "test": store},
        way=task.way,
        shot=task.shot,
        query=task.query,
        seed=seed,
        device=device,
        dtype=dtype,
    )


def register() -> None:
    """Make `data=pixels` an option, as a plugin of metarun does, and tell Hydra all schemas."""
    components.register("data", "pixels", PixelsConfig, pixels)
    compose.register_schemas()
