"""Pre-training: an ordinary classifier of all training classes, learned from plain batches."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.adapting import Encode, OuterLoss
from metarun.components.algo.base import Problem
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.normalising import Normalising
from metarun.components.backbone.norm import Seen, collecting
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import settings
from metarun.episodes.source import Batch
from metarun.unroll import Meta, Params

PREFIX = "classifier."
"""Begins the names of the classifier's parameters among the meta-parameters."""

Scores = Callable[[Params, Tensor], Tensor]
"""`scores(params, features)`: (examples, features) -> (examples, classes)."""


@settings
class PretrainingConfig:
    """What every algorithm has that learns from plain batches."""

    of_training: ClassVar[tuple[str, ...]] = ("batch_size",)

    batch_size: int = 16  # examples of a plain batch; a meta-step has trainer.meta_batch of them

    def __post_init__(self) -> None:
        between("algo.batch_size", self.batch_size, 1, MOST_STEPS)


class Pretraining(NamedTuple):
    """A classifier of all training classes.

    Attributes:
        start: initial parameters, those of the features and, behind `PREFIX`, the classifier's.
        embed: `embed(meta, x)`: (examples, …) -> (examples, features).
        width: how many features there are.
        logits: `logits(meta, x)`: (examples, …) -> (examples, training classes).
        classify: `classify(meta, features, labels) -> (cross entropy, extra)`.
        look: `look(meta, batch) -> (features, kept)`, with the next moving averages of
            normalisation, where those are kept.
        loss: the cross entropy of a `Batch`, with extra["kept"].
    """

    start: dict[str, Tensor]
    embed: Encode
    width: int
    logits: Encode
    classify: Callable[[Meta, Tensor, Tensor], tuple[Tensor, dict[str, Any]]]
    look: Callable[[Meta, Batch], tuple[Tensor, dict[str, Tensor]]]
    loss: OuterLoss


def linear(width: int, classes: int) -> dict[str, Tensor]:
    """Initial weight (classes, width) and bias (classes,) of a linear classifier, as torch's."""
    layer = torch.nn.Linear(width, classes)
    return {"weight": layer.weight.detach(), "bias": layer.bias.detach()}


def linear_scores(params: Params, features: Tensor) -> Tensor:
    """Wx + b."""
    return F.linear(features, params["weight"], params["bias"])


def pretraining(
    problem: Problem,
    algo: str,
    classifier: Callable[[int, int], dict[str, Tensor]] = linear,
    scores: Scores = linear_scores,
) -> Pretraining:
    """The pre-training of a backbone.

    Args:
        problem: a classification with labelled training images; of the model, the features.
        algo: the algorithm's name, for messages.
        classifier: `classifier(width, classes)`, its initial parameters.
        scores: of such parameters and of features.

    Raises:
        ValueError: there are no labelled images, or the model has no features.
    """
    if problem.ways is None or problem.classes is None:
        raise ValueError(
            f"algo={algo} learns from plain batches of labelled images, which these data do not "
            "have: choose data=glyphs or data=omniglot"
        )
    objective, normalising = problem.objective, Normalising(problem.norm, problem.model)
    features, embed = embedding(problem.model, algo)
    like = next(problem.model.parameters())  # frozen ones are none of `features`
    width = width_of(problem, embed, features)
    own = {name: value.to(like) for name, value in classifier(width, problem.classes).items()}

    def outputs_of(meta: Meta, given: Tensor) -> Tensor:
        return scores({name: meta[PREFIX + name] for name in own}, given)

    def logits(meta: Meta, x: Tensor) -> Tensor:
        return outputs_of(meta, embed(meta, x))

    def classify(meta: Meta, given: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        outputs = outputs_of(meta, given)
        value = objective.loss(outputs, labels)
        return value, {"loss": value, "score": objective.score(outputs, labels)}

    def look(meta: Meta, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with collecting() if normalising.kept else nullcontext(Seen()) as seen:
            given = embed(meta, batch.x)
        return given, normalising.updated(meta, seen) if normalising.kept else {}

    def loss(meta: Meta, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        given, kept = look(meta, batch)
        value, extra = classify(meta, given, batch.y)
        return value, extra | {"kept": kept}

    start = features | {PREFIX + name: value for name, value in own.items()}
    return Pretraining(start, embed, width, logits, classify, look, loss)
