"""An ordinary classifier of all training classes, which some methods learn on plain batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.adapting import Encode
from metarun.components.algo.base import Problem
from metarun.components.algo.embedding import embedding, width_of
from metarun.unroll import Meta

WEIGHT, BIAS = "classifier.weight", "classifier.bias"


class Classifier(NamedTuple):
    """Features, and a linear classifier of them.

    Attributes:
        start: the initial parameters of both.
        embed: `embed(meta, x)`: (examples, …) -> (examples, width).
        width: how many features there are.
        loss: `loss(meta, features, labels) -> (cross entropy, extra)`, as of an `Algorithm`.
    """

    start: dict[str, Tensor]
    embed: Encode
    width: int
    loss: Callable[[Meta, Tensor, Tensor], tuple[Tensor, dict[str, Any]]]


def classifier(problem: Problem, algo: str) -> Classifier:
    """The classifier of all training classes of a problem.

    Args:
        problem: a classification with labelled training images; of the model, the features.
        algo: the algorithm's name, for messages.

    Raises:
        ValueError: there are no labelled images, or the model has no features.
    """
    if problem.ways is None or problem.classes is None:
        raise ValueError(
            f"algo={algo} learns from plain batches of labelled images, which these data do not "
            "have: choose data=glyphs or data=omniglot"
        )
    objective = problem.objective
    start, embed = embedding(problem.model, algo)
    like = next(iter(start.values()))
    width = width_of(problem, embed, start)
    linear = torch.nn.Linear(width, problem.classes)
    own = {WEIGHT: linear.weight.detach().to(like), BIAS: linear.bias.detach().to(like)}

    def loss(meta: Meta, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        outputs = F.linear(features, meta[WEIGHT], meta[BIAS])
        value = objective.loss(outputs, labels)
        return value, {"loss": value, "score": objective.score(outputs, labels)}

    return Classifier(start | own, embed, width, loss)
