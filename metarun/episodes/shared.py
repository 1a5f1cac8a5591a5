"""Classes that two sources have in common: those that share a picture, to the last bit.

Names say little: two data sets may call one class differently, or two classes alike.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.episodes.examples import LabelledExamples
from metarun.episodes.several import SeveralSources
from metarun.episodes.source import EpisodeSource
from metarun.episodes.store import ClassStore

DIGEST = 16  # bytes
LEARNED_FROM = {"train": ("train", "held_out"), "val": ("val",), "test": ("test",)}
"""The parts of labelled examples by the split of tasks that they are like."""

Pictures = set[bytes]
"""Digests of some pictures."""


class Seen(NamedTuple):
    """How many classes were seen before.

    Attributes:
        trained_on: share a picture with a class of training.
        validated_on: share none with these, and one with a class of validation.
        of: how many classes there are.
    """

    trained_on: int
    validated_on: int
    of: int


def digests(images: Tensor) -> list[bytes]:
    """A digest of the content of each image, or of each row of features."""
    rows = images.cpu().flatten(1).contiguous().numpy()
    return [hashlib.blake2b(row, digest_size=DIGEST).digest() for row in rows]


def class_pictures(source: EpisodeSource, split: str) -> list[Pictures]:
    """The pictures of each class of a split; none where a source has no classes of its own.

    Pictures of one colour are left out: they make no two classes the same.
    """
    if isinstance(source, SeveralSources):
        return [own for each in source.sources.values() for own in class_pictures(each, split)]
    if isinstance(source, LabelledExamples):
        # As one class: how many there are is asked of the tasks that are tested alone.
        images = torch.cat([source.pictures(part) for part in LEARNED_FROM[split]])
        return [set(digests(images)) - _of_one_colour(images)]
    stores: dict[str, ClassStore] = getattr(source, "stores", {})
    if split not in stores:
        return []
    store = stores[split]
    plain = _of_one_colour(store.images)
    bounds = zip(store.starts.tolist(), store.sizes.tolist(), strict=True)
    return [set(digests(store.images[start : start + size])) - plain for start, size in bounds]


def together(classes: Iterable[Pictures]) -> Pictures:
    """The pictures of all classes."""
    return set[bytes]().union(*classes)


def count_seen(classes: Sequence[Pictures], trained: Pictures, validated: Pictures) -> Seen:
    """How many classes have a picture among those of training, or else of validation."""
    first = [own.isdisjoint(trained) for own in classes]
    later = [new and not own.isdisjoint(validated) for own, new in zip(classes, first, strict=True)]
    return Seen(first.count(False), later.count(True), len(classes))


def _of_one_colour(images: Tensor) -> Pictures:
    """The digests of those pictures whose pixels, or features, are all equal."""
    if not len(images):
        return set()
    rows = images.flatten(2) if images.dim() > 2 else images[:, None]
    return set(digests(images[(rows.amin(-1) == rows.amax(-1)).all(1)]))
