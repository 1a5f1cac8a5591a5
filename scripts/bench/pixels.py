"""Random images as a data set of metarun: the shapes of real ones, for timing alone."""

from dataclasses import dataclass
from functools import cache

import torch

from metarun.components import build as components
from metarun.components.data.images import image_episodes
from metarun.config import compose
from metarun.episodes.store import ClassStore, from_equal_classes


@dataclass
class PixelsConfig:
    """Random pixels."""

    name: str = "pixels"
    channels: int = 3  # of an image
    side: int = 84  # pixels
    classes: int = 64
    images: int = 20  # of each class


def load(channels: int, side: int, classes: int, images: int) -> dict[str, ClassStore]:
    """The same images for every split and at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (classes, images, channels, side, side)
    drawn = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    store = from_equal_classes(drawn, [str(index) for index in range(classes)])
    return {"train": store, "val": store, "test": store}


@cache
def register() -> None:
    """Make `data=pixels` an option, as a plugin of metarun does, and tell Hydra all schemas."""
    components.register("data", "pixels", PixelsConfig, image_episodes(load))
    compose.register_schemas()
