"""How far pictures are from what a run was trained on, by a figure with a definition.

The figure of a picture is a percentage: of the run's own validation pictures, how many are nearer
to its training pictures than this one. 50 % is like a picture of a new class of the same data,
100 % is farther away than any of them. Near is the root mean square difference of the pixels of
the inputs (0 to 1), in a grid of 8 × 8 means; what counts is the nearest of the training pictures.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.episodes.source import ImageEpisodes

GRID = 8  # means of each side
PICTURES = 1000  # of training, and of validation, spread over all


class Familiar(NamedTuple):
    """What pictures are compared with.

    Attributes:
        training: float32 (pictures, numbers), of training pictures.
        distances: float32 (pictures,), of validation pictures to the nearest of these, sorted.
    """

    training: Tensor
    distances: Tensor


def familiar(source: ImageEpisodes) -> Familiar:
    """What pictures are compared with, from the data of a run."""
    training, validation = (_spread(source, split) for split in ("train", "val"))
    return Familiar(training, _nearest(validation, training).sort().values)


def unfamiliarity(inputs: Tensor, compared: Familiar) -> Tensor:
    """The percentage of validation pictures that are nearer to training than each picture.

    Args:
        inputs: of the network, (pictures, channels, height, width).

    Returns:
        float64 (pictures,), from 0 to 100.
    """
    distances = _nearest(_coarse(inputs), compared.training)
    nearer = torch.searchsorted(compared.distances, distances)
    return 100 * nearer.double() / len(compared.distances)


def _spread(source: ImageEpisodes, split: str) -> Tensor:
    store = source.stores[split]
    ranges = zip(store.starts.tolist(), store.sizes.tolist(), strict=True)
    everything = torch.cat([torch.arange(start, start + size) for start, size in ranges])
    count = min(PICTURES, len(everything))
    chosen = everything[torch.arange(count) * len(everything) // count]
    return _coarse(source.values(store.take(chosen.to(store.sizes.device))))


def _coarse(inputs: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(inputs.float().cpu(), GRID).flatten(1)


def _nearest(rows: Tensor, others: Tensor) -> Tensor:
    # By differences: a product of matrices would leave a picture some way from itself.
    apart: Tensor = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    nearest: Tensor = apart.amin(1) / rows.shape[1] ** 0.5
    return nearest
