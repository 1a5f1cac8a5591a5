"""Queries assigned to the classes of their task together, as many to each as it has.

Whoever knows that each class has q queries knows more than a classifier of single queries. Where
one query a class is the protocol, as in Lake's runs, no two queries can be of one class. The labels
are those with the largest sum of log-probabilities among all that give each class its q queries.
That is a transductive figure, beside the usual one and never in its place.
"""

from collections.abc import Iterable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metarun.training.evaluation import confidence95


def assign(scores: Tensor, each: int) -> Tensor:
    """The labels of queries of which each class has the same number.

    Args:
        scores: (queries, way), of which the softmax are probabilities; queries = each · way.
        each: queries of a class.

    Returns:
        int64 (queries,), each label `each` times.

    Example:
        >>> import torch
        >>> from metarun.inference.assignment import assign
        >>> assign(torch.tensor([[2.0, 0.0], [1.0, 0.5]]), 1)
        tensor([0, 1])
    """
    benefit = scores.double().log_softmax(-1).repeat_interleave(each, 1)
    _, places = linear_sum_assignment(benefit.numpy(), maximize=True)
    return torch.from_numpy(places) // each


def assigned_figures(each: int, found: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The accuracy of assigned queries over tasks.

    Args:
        each: queries of a class.
        found: the scores and the labels of tasks, as `each_task` gives them.
    """
    right = [(assign(scores, each) == labels).double().mean() for scores, labels in found]
    return {
        "accuracy": float(torch.stack(right).mean()),
        "ci95": confidence95(torch.stack(right)),
        "tasks": len(right),
        "queries_of_each_class": each,
        "transductive": True,
    }


def line(figures: dict[str, Any]) -> str:
    """What a person reads of it."""
    right, apart = 100 * figures["accuracy"], 100 * figures["ci95"]
    return (
        f"assigned together, {figures['queries_of_each_class']} queries to each class "
        f"(transductive): accuracy {right:.2f} % ± {apart:.2f} %, error {100 - right:.2f} %"
    )
