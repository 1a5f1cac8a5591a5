"""Tasks that are padded: what of them counts, and an objective that leaves the rest out.

Uneven tasks (`metarun.episodes.uneven`) have examples with the label `PADDING`, and classes without
examples. What an algorithm makes of a padded task has to be what it would make of the task alone:
means are over known examples, and absent classes have no probability.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES, Objective, Problem
from metarun.components.backbone.norm import counting
from metarun.episodes.uneven import PADDING
from metarun.unroll import InnerOptimizer, LossOptimizer, Params


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
        return mean_of_known(each, labels)

    def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
        right = (scores.argmax(dim=-1) == labels).double()
        right = right.masked_fill(scores.isnan().any(dim=-1), torch.nan)
        return mean_of_known(right, labels)

    return objective._replace(loss=loss, score=accuracy)


def mean_of_known(each: Tensor, labels: Tensor) -> Tensor:
    """The mean of what belongs to examples, over those that do not pad a task."""
    counted = known(labels)
    return torch.where(counted, each, torch.zeros_like(each)).sum() / counted.sum()


def support_outputs(problem: Problem, outputs: Callable[[], Tensor], labels: Tensor) -> Tensor:
    """The outputs for a support set; of an uneven task, as its own examples and classes give them.

    Args:
        problem: says whether tasks are uneven.
        outputs: computes them.
        labels: of the support set.
    """
    if not problem.uneven:
        return outputs()
    with counting(known(labels)):
        found = outputs()
    return without_absent(found, labels)


def objective_of(kind: str, uneven: bool) -> Objective:
    """What is minimised in tasks of a kind, and what is reported of them."""
    return over_known(OBJECTIVES[kind]) if uneven else OBJECTIVES[kind]


def refuse_rows_together(problem: Problem, algo: str, heads: Params, others: Params) -> None:
    """Refuse an inner optimizer by which the head of a class that pads a task moves the others.

    Args:
        problem: says which optimizer it is, and whether tasks are uneven.
        algo: the algorithm's name, for the message.
        heads: what has a row for each class, by name.
        others: what is adapted beside it.

    Raises:
        ValueError: tasks are uneven, and it is such a one.
    """
    if problem.uneven and not moves_rows_apart(problem.inner.optimizer, heads, others):
        raise ValueError(
            f"inner_opt: a step of it moves the head of a class by the others, and algo={algo} has "
            "heads for the classes that pad an uneven task; choose sgd, adam or another one that "
            "takes each number by itself"
        )


def moves_rows_apart(
    optimizer: InnerOptimizer | LossOptimizer, heads: Params, others: Params
) -> bool:
    """Whether two steps of heads are the same if they have a further row of zeros."""
    if isinstance(optimizer, LossOptimizer):
        return False
    generator = torch.Generator().manual_seed(0)
    first, *grads = [
        {n: torch.randn(v.shape, dtype=torch.float64, generator=generator) for n, v in all_.items()}
        for all_ in [{**heads, **others}] * 3
    ]

    def moved(rows: int) -> Params:
        def padded(values: Params) -> Params:
            more = {n: F.pad(values[n], (0, 0) * (values[n].dim() - 1) + (0, rows)) for n in heads}
            return {**values, **more}

        params = padded(first)
        state = optimizer.init(params)
        for grad in grads:
            params, state = optimizer.update(padded(grad), state, params, optimizer.hyper)
        return {name: params[name][: len(first[name])] for name in heads}

    few, many = moved(0), moved(1)
    return all(torch.allclose(few[n], many[n], rtol=1e-12, atol=1e-12) for n in heads)
