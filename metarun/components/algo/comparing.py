"""What methods that compare queries with the examples of each class have in common."""

import torch
from torch import Tensor

from metarun.components.algo.adapting import Support, one_hot
from metarun.components.algo.base import Problem


def refuse_regression(problem: Problem, algo: str) -> None:
    """Refuse a problem without classes.

    Args:
        algo: the algorithm's name, for the message.

    Raises:
        ValueError: it is a regression.
    """
    if problem.ways is None:
        raise ValueError(f"algo={algo} tells classes apart: choose data that have classes")


def class_means(support: Support) -> Tensor:
    """The mean of the encoded examples of each class, (way, features); of an absent class, 0."""
    members = one_hot(support)
    counts = members.sum(0)[:, None]
    if support.known is not None:
        counts = counts.clamp(min=1)
    means: Tensor = members.T @ support.x / counts
    return means


def directions(x: Tensor) -> Tensor:
    """Vectors of length 1 along those of the last dimension; a vector of zeros stays as it is.

    Dead ReLUs give vectors of zeros. `F.normalize` has a gradient of 1e12 there.
    """
    squared = x.square().sum(-1, keepdim=True)
    return x * torch.where(squared > 0, squared, torch.ones_like(squared)).rsqrt()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖², (rows of x, rows of y)."""
    return (x[:, None] - y).square().sum(-1)
