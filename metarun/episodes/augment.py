"""Augmentation of training tasks: random changes of each picture, as a function of its place alone.

The changes of picture `k` of the support set of training episode `i` depend on `(seed, i, k)`, and
so do those of queries and of plain batches: not on what is drawn with it, nor on other transforms.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metarun.config.augment import COLOURS, AugmentConfig, Half
from metarun.episodes.rng import random_bits, stream_key, uniform
from metarun.episodes.source import EpisodeSource
from metarun.episodes.transforms import recolour, warp, window

NUMBERS = (
    "crop_down",
    "crop_right",
    "flip",
    "vertical_flip",
    "rotation",
    "translate_right",
    "translate_down",
    "scale",
    "shear",
    *COLOURS,
    *(f"{name}_place" for name in COLOURS),
)
"""The random numbers of a picture, each with a counter of its own."""


class Augmentation:
    """What is done to the pictures of one half of a task, or of a plain batch.

    Pictures are moved and flipped first, then warped, then their colours change. The parameters
    are drawn as torchvision's `RandomCrop` (with padding), `RandomHorizontalFlip`, `RandomAffine`
    and `ColorJitter` draw theirs.

    Args:
        config: the settings.
        half: "support" or "query"; None: plain batches.
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, half: Half | None, seed: int) -> None:
        self._on = config.of(half)
        off = {name: None for name in config.on if name not in self._on}
        self._config = replace(config, support=None, query=None, **off)
        self._key = stream_key("augment", seed, half or "batch")

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """The pictures of episodes `start`, `start + 1`, …, changed.

        Args:
            images: (episodes, pictures, channels, height, width), in [0, 1].

        Returns:
            As `images`.
        """
        if not self._on:
            return images
        drawn = self._drawn(start, images.shape[0], images.shape[1], images.device)
        flat = images.flatten(0, 1)
        for change in (self._window, self._warp, self._recolour):
            flat = change(flat, drawn)
        return flat.view(images.shape)

    def _drawn(
        self, start: int, episodes: int, pictures: int, device: torch.device
    ) -> dict[str, Tensor]:
        """The random numbers of each picture: float64 (episodes * pictures,), in [0, 1)."""
        numbers = torch.arange(start, start + episodes, device=device)
        keys = random_bits(self._key, numbers)[:, None]
        keys = random_bits(keys, torch.arange(pictures, device=device)).flatten()[:, None]
        drawn = uniform(keys, torch.arange(len(NUMBERS), device=device))
        return dict(zip(NUMBERS, drawn.unbind(1), strict=True))

    def _window(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        own = self._config
        if not {"crop", "flip", "vertical_flip"}.intersection(self._on):
            return images
        border = own.crop or 0
        return window(
            images,
            (drawn["crop_down"] * (2 * border + 1)).long(),
            (drawn["crop_right"] * (2 * border + 1)).long(),
            drawn["flip"] < (own.flip or 0),
            drawn["vertical_flip"] < (own.vertical_flip or 0),
            border=border,
            fill=own.fill or 0,
        )

    def _warp(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        own = self._config
        if not {"rotation", "translate", "scale", "shear"}.intersection(self._on):
            return images
        height, width = images.shape[-2:]
        part, (least, largest) = own.translate or 0, own.scale or (1, 1)
        return warp(
            images,
            _between(-(own.rotation or 0), own.rotation or 0, drawn["rotation"]),
            _between(-part * width, part * width, drawn["translate_right"]).round(),
            _between(-part * height, part * height, drawn["translate_down"]).round(),
            _between(least, largest, drawn["scale"]),
            _between(-(own.shear or 0), own.shear or 0, drawn["shear"]),
            fill=own.fill or 0,
        )

    def _recolour(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        kinds = [name for name in COLOURS if name in self._on]
        if not kinds:
            return images
        amounts = torch.stack([self._amount(name, drawn[name]) for name in kinds], 1)
        order = torch.stack([drawn[f"{name}_place"] for name in kinds], 1).argsort(1)
        return recolour(images, kinds, amounts, order)

    def _amount(self, name: str, drawn: Tensor) -> Tensor:
        most = getattr(self._config, name)
        least, largest = (-most, most) if name == "hue" else (max(0, 1 - most), 1 + most)
        return _between(least, largest, drawn)


class AugmentedEpisodes:
    """A source whose training episodes are augmented; those of other splits are as they are."""

    def __init__(self, source: EpisodeSource, config: AugmentConfig, seed: int) -> None:
        self._source = source
        self._support = Augmentation(config, "support", seed)
        self._query = Augmentation(config, "query", seed)
        self.input_shape, self.outputs, self.kind = source.input_shape, source.outputs, source.kind

    def sample(self, split: str, start: int, count: int) -> Any:
        """Episodes `start` … `start + count - 1` of a split."""
        drawn = self._source.sample(split, start, count)
        if split != "train":
            return drawn
        return drawn._replace(  # a plugin's episodes may have more fields
            support_x=self._support(drawn.support_x, start),
            query_x=self._query(drawn.query_x, start),
        )


def _between(least: float, largest: float, drawn: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) as such from `least` to `largest`."""
    return least + (largest - least) * drawn
