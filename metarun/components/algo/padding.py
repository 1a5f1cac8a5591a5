"""Tasks that are padded: what of them counts, and an objective that leaves the rest out.

Uneven tasks (`metarun.episodes.uneven`) have examples with the label `PADDING`, and classes without
examples. What an algorithm makes of a padded task has to be what it would make of the task alone:
means are over known examples, and absent classes have no probability.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES, Objective
from metarun.episodes.uneven import PADDING


class Known(NamedTuple):
    """Which examples belong to a task, bool (examples,); None: all of them."""

    support: Tensor | None = None
    queries: Tensor | None = None


def known(labels: Tensor) -> Tensor:
    """Which examples belong to a task, by their labels; bool, of the same shape."""
    return labels != PADDING


def present(support_y: Tensor, way: int) -> Tensor:
    """Which classes a task has, bool (way,): those with support examples."""
    classes = torch.arange(way, device=support_y.device)
    return (support_y[:, None] == classes).any(0)


def without_absent(scores: Tensor, support_y: Tensor) -> Tensor:
    """The scores (queries, way), −∞ for the classes that a task does not have."""
    absent = ~present(support_y, scores.shape[1])
    return scores.masked_fill(absent, -torch.inf)


def over_known(objective: Objective) -> Objective:
    """The objective of a classification as a mean over the known examples of a task."""

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        counted = known(labels)
        places = torch.where(counted, labels, 0)[:, None]  # every task has a class 0
        each = -scores.log_softmax(-1).gather(1, places)[:, 0]
        return _mean(each, counted)

    def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
        right = (scores.argmax(dim=-1) == labels).double()
        right = right.masked_fill(scores.isnan().any(dim=-1), torch.nan)
        return _mean(right, known(labels))

    return objective._replace(loss=loss, score=accuracy)


def _mean(each: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, each, torch.zeros_like(each)).sum() / counted.sum()


def objective_of(kind: str, uneven: bool) -> Objective:
    """What is minimised in tasks of a kind, and what is reported of them."""
    return over_known(OBJECTIVES[kind]) if uneven else OBJECTIVES[kind]
