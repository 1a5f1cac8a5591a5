"""Which classes and images an episode has: pure functions of its number."""

import torch
from torch import Tensor

from metarun.episodes.groups import Groups
from metarun.episodes.rng import random_bits, uniform
from metarun.episodes.store import ClassStore


def sample_indices(
    store: ClassStore,
    *,
    key: int,
    start: int,
    count: int,
    way: int,
    per_class: int,
    groups: Groups | None = None,
) -> Tensor:
    """Choose images for episodes `start` … `start + count - 1`.

    Every class gets a random 64-bit rank in every episode and the `way` highest are taken, in
    that order; the images of a chosen class are ranked likewise. So classes are distinct,
    their labels are random, and support and query are disjoint.

    With groups, all classes of an episode are of one. Each group that has `way` classes or more is
    as likely as any other, however many it has.

    Returns:
        int64 (count, way, per_class): indices into `store.images`.
    """
    keys, _ = episode_keys(store, key, start, count)
    return choose_images(store, keys, choose_classes(store, keys, way, groups), per_class)


def episode_keys(store: ClassStore, key: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """The key of each episode (count, 1), and its number (count,)."""
    episodes = torch.arange(start, start + count, device=store.sizes.device)
    return random_bits(key, episodes)[:, None], episodes


def choose_classes(store: ClassStore, keys: Tensor, way: int, groups: Groups | None) -> Tensor:
    """The numbers of the classes of each episode, (count, way)."""
    device, number = store.sizes.device, len(store.class_names)
    class_ranks = random_bits(keys, torch.arange(number, device=device))
    if groups is not None:
        counter = torch.full((1,), -1 - number, device=device)  # unused by what is drawn below
        place = (uniform(keys, counter) * len(groups.large)).long()
        elsewhere = groups.of_class != groups.large[place]
        if way > groups.least:  # further classes are any of other groups
            order = class_ranks.argsort(dim=1, descending=True)
            own_first = elsewhere.gather(1, order).int().argsort(dim=1, stable=True)
            return order.gather(1, own_first)[:, :way]
        class_ranks = class_ranks.masked_fill(elsewhere, torch.iinfo(torch.int64).min)
    return class_ranks.topk(way, dim=1).indices


def choose_images(store: ClassStore, keys: Tensor, classes: Tensor, per_class: int) -> Tensor:
    """The numbers of images of each class, (count, way, per_class); behind its last, any."""
    class_keys = random_bits(keys, -1 - classes)[:, :, None]  # negative: unused so far
    image = torch.arange(store.largest, device=store.sizes.device)
    image_ranks = random_bits(class_keys, image)
    beyond_class = image >= store.sizes[classes][:, :, None]
    image_ranks = image_ranks.masked_fill(beyond_class, torch.iinfo(torch.int64).min)
    images = image_ranks.topk(per_class, dim=2).indices
    return store.starts[classes][:, :, None] + images
