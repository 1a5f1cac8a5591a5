"""Queries assigned to the classes of their task together, as many to each as it has.

Whoever knows that each class has q queries knows more than a classifier of single queries. Where
one query a class is the protocol, as in Lake's runs, no two queries can be of one class. The labels
are those with the largest sum of log-probabilities among all that give each class its q queries.
That is a transductive figure, beside the usual one and never in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metarun.errors import ConfigError
from metarun.inference.outcomes import each_task, source_of
from metarun.inference.trained import Trained
from metarun.training.evaluation import confidence95
from metarun.training.setup import Setup


def refuse_assignment(setup: Setup) -> None:
    """Refuse what has no classes with as many queries each.

    Raises:
        ConfigError: the tasks are no classification of images of one shape, or several processes
            evaluate.
    """
    source_of(setup, "assign=true")
    if setup.ranks.count > 1:
        raise ConfigError("assign=true is for one process: start it without torchrun")


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


def assigned_figures(
    trained: Trained, split: str, tasks: int, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    """The accuracy of assigned queries over tasks 0 … `tasks` - 1 of a split.

    Args:
        trained: the run, with its data.
        on_progress: called with the number of tasks done.
    """
    source = source_of(trained.setup, "assign=true")
    right = [
        (assign(scores, source.query) == labels).double().mean()
        for scores, labels in each_task(trained, source, split, tasks, on_progress)
    ]
    each = torch.stack(right)
    return {
        "accuracy": float(each.mean()),
        "ci95": confidence95(each),
        "tasks": tasks,
        "queries_of_each_class": source.query,
        "transductive": True,
    }


def line(figures: dict[str, Any]) -> str:
    """What a person reads of it."""
    right, apart = 100 * figures["accuracy"], 100 * figures["ci95"]
    return (
        f"assigned together, {figures['queries_of_each_class']} queries to each class "
        f"(transductive): accuracy {right:.2f} % ± {apart:.2f} %, error {100 - right:.2f} %"
    )
