"""What a run makes of many tasks: the scores of every query, known or not."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metarun.episodes.source import Episodes, ImageEpisodes
from metarun.errors import ConfigError, RunError
from metarun.inference.trained import Trained
from metarun.training.setup import Setup


class Outcomes(NamedTuple):
    """Scores of tasks.

    Attributes:
        scores: float64 (tasks, queries, way), of queries of the classes of their task.
        labels: int64 (tasks, queries).
        classes: int64 (tasks, queries), the number of the query's class in its split.
        unknown: (tasks, queries, way), of queries of other classes; None where a split has no
            more classes than a task.
    """

    scores: Tensor
    labels: Tensor
    classes: Tensor
    unknown: Tensor | None


def source_of(setup: Setup, asked: str = "calibrate=true") -> ImageEpisodes:
    """The images of the run's data.

    Args:
        asked: what they are needed for, as it was typed.

    Raises:
        ConfigError: they are no labelled images, the tasks are uneven, or several processes
            evaluate.
    """
    if setup.ranks.count > 1:
        raise ConfigError(f"{asked} is for one process: start it without torchrun")
    if not isinstance(setup.source, ImageEpisodes):
        raise ConfigError(
            f"{asked} is for data of labelled images, not for data={setup.config.data.name}"
        )
    if setup.source.uneven is not None:
        raise ConfigError(
            f"{asked} is for tasks of one shape: give task.min_way and task.min_shot the "
            "values of task.way and task.shot, and task.imbalanced=false, or leave it out"
        )
    return setup.source


def checked(scores: Tensor, of: str = "") -> Tensor:
    """The scores (pictures, classes), float64 on the CPU.

    Args:
        of: which task they are of, for the message.

    Raises:
        RunError: they are no numbers.
    """
    scores = scores.double().cpu()
    # A class may have probability 0, whose logarithm is −∞.
    if (scores.isnan() | (scores == torch.inf)).any() or scores.amax(1).isinf().any():
        raise RunError(
            f"{of}the adapted network gives scores that are no finite numbers: a lower "
            "algo.eval_inner_steps may help, or more examples of each class"
        )
    return scores


def drawn_source_of(setup: Setup, asked: str) -> ImageEpisodes:
    """The images of the run's data, where the classes of a task are known.

    Raises:
        ConfigError: as `source_of`, or the tasks are fixed.
    """
    source = source_of(setup, asked)
    if type(source).sample is not ImageEpisodes.sample:
        raise ConfigError(
            f"{asked}: data={setup.config.data.name} has fixed tasks, and does not say of which "
            "classes they are; leave it out"
        )
    return source


def each_task(
    trained: Trained,
    source: ImageEpisodes,
    split: str,
    tasks: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Adapt to tasks 0 … `tasks` - 1 of a split and score all queries of each together.

    Args:
        trained: the run, with its data.
        source: its data (`source_of`).
        on_progress: called with the number of tasks done.

    Yields:
        The scores (queries, way) and the labels int64 (queries,) of each task, on the CPU.

    Raises:
        RunError: scores are no numbers.
    """
    for index in tqdm(range(tasks), desc=f"{split} tasks", unit="task", disable=None):
        support_x, support_y, query_x, query_y = (p[0] for p in source.sample(split, index, 1))
        scores = trained.adapt(support_x, support_y, source.way)(query_x)
        yield checked(scores, f"{split} task {index}: "), query_y.cpu()
        on_progress(index + 1)


def outcomes(
    trained: Trained,
    split: str,
    tasks: int,
    counts: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Outcomes:
    """Adapt to tasks 0 … `tasks` - 1 of a split and score their queries.

    Queries of other classes are those of further classes of the split. Where predictions depend
    on all queries of a batch, they are scored together with the known ones, as in a folder that
    has both.

    Args:
        counts: examples of each class; None: as many as in an evaluation.
        on_progress: called with the number of tasks done.

    Raises:
        ConfigError: the data are no labelled images.
        RunError: scores are no numbers.
    """
    source = source_of(trained.setup)
    way, shot = source.way, source.shot
    others = min(way, len(source.stores[split].class_names) - way)
    wide = source.with_more_classes(others)
    kept = list(range(way * shot))
    if counts is not None:
        kept = [label * shot + one for label, count in enumerate(counts) for one in range(count)]
    scores, labels, classes, unknown = [], [], [], []
    for index in tqdm(range(tasks), desc=f"{split} tasks", unit="task", disable=None):
        task = Episodes(*(part[0] for part in wide.sample(split, index, 1)))
        predict = trained.adapt(task.support_x[kept], task.support_y[kept], way)
        known = task.query_y < way
        queries, strangers = task.query_x[known], task.query_x[~known]
        told = f"{split} task {index}: "
        scores.append(checked(predict(queries), told))
        labels.append(task.query_y[known].cpu())
        classes.append(wide.classes(split, index, 1)[0].cpu()[labels[-1]])
        if others:
            together = trained.predict_together is not None
            asked = torch.cat([queries, strangers]) if together else strangers
            unknown.append(checked(predict(asked)[-len(strangers) :], told))
        on_progress(index + 1)
    return Outcomes(
        torch.stack(scores),
        torch.stack(labels),
        torch.stack(classes),
        torch.stack(unknown) if others else None,
    )
