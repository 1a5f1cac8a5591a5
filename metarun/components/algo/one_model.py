"""Training one classifier on labelled examples: what the algorithms that do so have in common."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metarun.components.algo.base import (
    Problem,
    Trace,
    apply_model,
    detached_parameters,
    evaluating,
)
from metarun.components.algo.normalising import Normalising
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import settings
from metarun.episodes.source import Batch
from metarun.unroll import Meta


@settings
class OneModelConfig:
    """What every algorithm has that trains one classifier, and solves no tasks."""

    # One model takes one step after the other.
    usual: ClassVar[dict[str, dict[str, Any]]] = {"trainer": {"meta_batch": 1}}
    of_training: ClassVar[tuple[str, ...]] = ()

    name: str = "???"
    batch_size: int = 32  # training examples of a step, and examples at a time in an evaluation

    def __post_init__(self) -> None:
        between("algo.batch_size", self.batch_size, 1, MOST_UNITS)


class Classifier(NamedTuple):
    """A network that tells all classes of some labelled examples apart.

    Attributes:
        start: its initial parameters, by name.
        outputs: `outputs(params, x)` in training: (examples, …) -> (examples, classes).
        normalising: its moving averages, where normalisation has some.
        trace: as in `Algorithm`, of one model.
    """

    start: dict[str, Tensor]
    outputs: Callable[[Meta, Tensor], Tensor]
    normalising: Normalising
    trace: Callable[[Meta, Batch], Trace]


def classifier(problem: Problem, algo: str) -> Classifier:
    """The backbone as a classifier.

    Args:
        problem: its model has as many outputs as the labelled examples have classes.
        algo: the algorithm's name, for messages.

    Raises:
        ValueError: the data are no labelled examples, or the backbone is to normalise by a support
            set.
    """
    if problem.examples is None:
        raise ValueError(
            f"algo={algo} trains one classifier on labelled examples, and these data have tasks: "
            "choose data=glyphs_examples or data=omniglot_examples"
        )
    if problem.norm in ("support", "support_plus_one"):
        raise ValueError(
            f"backbone.norm={problem.norm}: algo={algo} has no support sets; choose running, or "
            "transductive for the examples of a batch"
        )
    model, objective = problem.model, problem.objective
    normalising = Normalising(problem.norm, model)

    def outputs(params: Meta, x: Tensor) -> Tensor:
        return apply_model(model, params, x)

    def trace(meta: Meta, batch: Batch) -> Trace:
        weights = {name: meta[name] for name in start}
        with evaluating(model):
            found = normalising.outputs(
                lambda x: outputs(weights, x), meta, batch.x, None, evaluates=True
            )
        each = (of_each(measure)(found, batch.y) for measure in (objective.loss, objective.score))
        return Trace(*(values[:, None] for values in each))

    start = detached_parameters(model)
    return Classifier(start, outputs, normalising, trace)


def of_each(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A mean over examples as a function that gives the value of each: (examples,)."""
    return torch.func.vmap(lambda outputs, target: measure(outputs[None], target[None]))
