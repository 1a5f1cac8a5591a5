"""Tasks whose number of classes and of support examples is drawn: padded to one shape.

An uneven task is held in tensors of the largest shape, so that tasks stack, and programs are
recorded once. What pads it has the label `PADDING` and repeats its first support example, since
not every network makes numbers of an example of zeros.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.config.run import TaskConfig
from metarun.episodes.rng import random_bits, uniform

PADDING = -1
"""The label of examples that are not part of a task."""

LOWEST, HIGHEST = math.log(0.5), math.log(2)  # of a class's log weight, where shots are imbalanced


class Uneven(NamedTuple):
    """Between what the shape of a task is drawn; its largest number of classes is `task.way`.

    Attributes:
        min_way: fewest classes.
        min_shot: fewest support examples of each class, where all classes have as many.
        imbalanced: whether each class has a number of its own.
        max_support: most support examples of a task, to which it is padded.
    """

    min_way: int
    min_shot: int
    imbalanced: bool
    max_support: int


def uneven_of(task: TaskConfig) -> Uneven | None:
    """What a task's settings say; None: all tasks have the same shape."""
    if task.uneven is None:
        return None
    return Uneven(
        task.way if task.min_way is None else task.min_way,
        task.shot if task.min_shot is None else task.min_shot,
        task.imbalanced,
        task.way * task.shot if task.max_support is None else task.max_support,
    )


def draw_shots(
    uneven: Uneven, key: int, episodes: Tensor, sizes: Tensor, shot: int, query: int
) -> Tensor:
    """The number of support examples of each class of each episode; 0: it is not part of it.

    The number of classes N is uniform between its limits. The first N are those of the episode.
    All of them have as many support examples, uniform between the limits.

    Imbalanced ones are drawn as in Meta-Dataset. With β uniform in (0, 1] and s images in class c,
    of which q are queries, the support set has S = min(max_support, Σ_c ⌈β·min(shot, s_c − q)⌉)
    examples at most. With log a_c uniform from log ½ to log 2 and r_c = a_c·s_c / Σ_k a_k·s_k,
    class c has min(⌊r_c·(S − N)⌋ + 1, s_c − q).

    Args:
        uneven: the limits.
        key: the stream of random numbers.
        episodes: int64 (count,), their numbers.
        sizes: int64 (count, way), the number of images of each class that may be part of it.
        shot: most support examples of each class; where they are imbalanced, most that a class
            adds to the size of the support set.
        query: queries of each class.

    Returns:
        int64 (count, way). The same on every machine where shots are not imbalanced; else up to
        the rounding of exponentials.

    References:
        Triantafillou et al. 2020, Meta-Dataset, section 3.2 and appendix; Bertinetto et al. 2019
        draw the shot of each task uniformly.
    """
    way, keys = sizes.shape[1], random_bits(key, episodes)[:, None]
    places = torch.arange(way, device=sizes.device)
    drawn = uniform(keys, torch.arange(2, device=sizes.device))
    of_way, of_size = drawn[:, :1], drawn[:, 1:]
    classes = uneven.min_way + (of_way * (way - uneven.min_way + 1)).long()
    there = places < classes  # (count, way)
    if not uneven.imbalanced:
        shots = uneven.min_shot + (of_size * (shot - uneven.min_shot + 1)).long()
        return torch.where(there, shots, 0)
    left = sizes - query
    added = torch.where(there, (of_size * left.clamp(max=shot)).long() + 1, 0)
    support = added.sum(1, keepdim=True).clamp(max=uneven.max_support)
    weights = (LOWEST + (HIGHEST - LOWEST) * uniform(keys, 2 + places)).exp() * sizes
    parts = torch.where(there, weights, 0.0)
    own = (parts / parts.sum(1, keepdim=True) * (support - classes)).long() + 1
    return torch.where(there, torch.minimum(own, left), 0)


def most_shots(uneven: Uneven, shot: int, query: int, largest: int) -> int:
    """The most support examples that a class can have.

    Args:
        uneven: the limits.
        shot: as of `draw_shots`.
        query: queries of each class.
        largest: images of the largest class.
    """
    if not uneven.imbalanced:
        return shot
    return min(uneven.max_support - uneven.min_way + 1, largest - query)


def choose_support(shots: Tensor, images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The support examples of each episode, class by class, then what pads it.

    Args:
        shots: int64 (count, way), how many each class has.
        images: int64 (count, way, per_class), the numbers of its images, those of the support
            first.
        size: examples of a padded support set.

    Returns:
        The numbers of the images and their labels, both int64 (count, size).
    """
    count, way, per_class = images.shape
    places = torch.arange(per_class, device=images.device)
    taken = (places < shots[:, :, None]).flatten(1)
    order = (~taken).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    labels = torch.arange(way, device=images.device).repeat_interleave(per_class).expand(count, -1)
    labels = labels.masked_fill(~taken, PADDING)
    numbers = torch.where(taken, images.flatten(1), images[:, 0, :1])
    return numbers.gather(1, order), labels.gather(1, order)


def choose_queries(shots: Tensor, images: Tensor, query: int) -> tuple[Tensor, Tensor]:
    """The queries of each episode, which follow the support images of their class.

    Args:
        shots, images: as of `choose_support`.
        query: queries of each class.

    Returns:
        The numbers of the images and their labels, both int64 (count, way * query).
    """
    count, way, _ = images.shape
    places = shots[:, :, None] + torch.arange(query, device=images.device)
    labels = torch.arange(way, device=images.device).expand(count, -1)
    labels = labels.masked_fill(shots == 0, PADDING).repeat_interleave(query, dim=1)
    numbers = images.gather(2, places).flatten(1)
    return torch.where(labels == PADDING, images[:, 0, :1], numbers), labels
