"""One task: the examples, the queries, and what each inner step makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.components.algo.padding import known as belongs
from metarun.episodes.source import Episodes, ImageEpisodes
from metarun.errors import ConfigError, DataError, printable_name
from metarun.inference.predict import inputs_of_run
from metarun.inference.support import read_pictures, read_support
from metarun.inference.trained import Trained
from metarun.pictures.listing import Listing, Picture

UNKNOWN = -1  # the label of a query of unknown class


class Explained(NamedTuple):
    """A task and what a run makes of it.

    Attributes:
        task: its tensors, without a first dimension.
        probabilities: float64 (inner steps + 1, queries, way), from before the first step.
        losses: float64 (inner steps + 1,), of the queries whose class is known; NaN without any.
        scores: the fraction of these that is right, likewise.
        names: of the classes; none where the data do not say which classes a task has.
    """

    task: Episodes
    probabilities: Tensor
    losses: Tensor
    scores: Tensor
    names: tuple[str, ...] = ()

    @property
    def known(self) -> Tensor:
        """Which queries are of a known class, bool (queries,)."""
        return self.task.query_y != UNKNOWN

    @property
    def legend(self) -> dict[int, str]:
        """The names of the classes that have examples, by their labels, in one line each."""
        there = set(self.task.support_y.tolist())
        return {n: printable_name(name) for n, name in enumerate(self.names) if n in there}


def task_of_run(trained: Trained, split: str, episode: int) -> Episodes:
    """A task of a run, without what pads an uneven one.

    Args:
        trained: the run, with its data.
        split: whose tasks.
        episode: the number of the task.

    Raises:
        ConfigError: the tasks are no classification of pictures.
    """
    source, name = trained.setup.source, trained.config.data.name
    shape = source.input_shape
    if source.kind != "classification" or len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"explain draws tasks of pictures, which data={name} does not have")
    task = Episodes(*(part[0] for part in source.sample(split, episode, 1)))
    support, queries = belongs(task.support_y), belongs(task.query_y)
    return Episodes(
        task.support_x[support],
        task.support_y[support],
        task.query_x[queries],
        task.query_y[queries],
    )


def names_of_run(trained: Trained, split: str, episode: int) -> tuple[str, ...]:
    """The classes of a task of a run, by their labels; none where its data do not say."""
    source = trained.setup.source
    if not isinstance(source, ImageEpisodes) or type(source).sample is not ImageEpisodes.sample:
        return ()
    names = source.stores[split].class_names
    return tuple(names[number] for number in source.classes(split, episode, 1)[0].tolist())


def task_of_folder(
    trained: Trained, support: Listing, queries: Sequence[str], skip_unreadable: bool = False
) -> Episodes:
    """A task of pictures that a person gives. A query is of the class whose name its folder has.

    Args:
        trained: the run.
        support: pictures of each class.
        queries: files of pictures.
        skip_unreadable: leave out pictures that cannot be read.

    Raises:
        ConfigError: the run has not learned from pictures.
        DataError: a picture cannot be read, or none can.
    """
    inputs = inputs_of_run(trained)
    examples = read_support(support, inputs, skip_unreadable)
    pictures = [Picture(path) for path in queries]
    pixels, kept = read_pictures(pictures, inputs, skip_unreadable, "reading the queries")
    if not kept:
        raise DataError(f"none of {len(queries)} queries can be read")
    number = {name: place for place, name in enumerate(examples.class_names)}
    folders = [Path(queries[place]).absolute().parent.name for place in kept]
    truth = [number.get(name, UNKNOWN) for name in folders]
    device = trained.setup.device
    return Episodes(
        trained.to_inputs(examples.pixels),
        examples.labels.to(device),
        trained.to_inputs(pixels),
        torch.tensor(truth, device=device),
    )


def explain(trained: Trained, task: Episodes, names: tuple[str, ...] = ()) -> Explained:
    """Adapt to a task, and look at the queries before and after each inner step.

    Args:
        trained: the run.
        task: its tensors, without a first dimension; queries of unknown class have the label
            `UNKNOWN`.
        names: of the classes.

    Raises:
        ConfigError: the algorithm does not say what its outputs are.
    """
    setup = trained.setup
    if setup.algorithm.outputs is None:
        raise ConfigError(
            f"algo={trained.config.algo.name} does not say what it predicts for each query: it is "
            "made neither by at_once nor by by_steps"
        )
    known = task.query_y != UNKNOWN
    truth = task.query_y[known]
    # No label of a query matters to what is predicted, but that of padding, which is left out.
    asked = task._replace(query_y=task.query_y.clamp(min=0))
    with trained.turns, torch.no_grad():
        outputs = setup.algorithm.outputs(trained.meta, asked)
        found = [setup.objective.loss(one[known], truth) for one in outputs]
        scores = [setup.objective.score(one[known], truth) for one in outputs]
    return Explained(
        Episodes(*(part.cpu() for part in task)),
        outputs.double().softmax(-1).cpu(),
        torch.stack(found).double().cpu(),
        torch.stack(scores).double().cpu(),
        names,
    )
