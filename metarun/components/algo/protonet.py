"""Prototypical networks (Snell, Swersky and Zemel 2017): the nearest mean of a class."""

from typing import ClassVar, Literal

from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once
from metarun.components.algo.base import OWN_PREFIX, Algorithm, Problem
from metarun.components.algo.comparing import (
    class_means,
    directions,
    refuse_regression,
    squared_distances,
)
from metarun.components.algo.embedding import embedding
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

SCALE = OWN_PREFIX + "scale"


@settings
class ProtonetConfig:
    """Prototypical networks (Snell et al. 2017): the nearest mean of a class; no inner loop."""

    of_training: ClassVar[tuple[str, ...]] = ("scale",)  # where a learned value starts

    distance: Literal["euclidean", "cosine"] = "euclidean"  # euclidean: its square
    normalise: bool = False  # divide it by the number of features, as MetaOptNet does
    scale: float | None = None  # initial factor of the scores, learned; null: 1, not learned

    def __post_init__(self) -> None:
        positive("algo.scale", self.scale)
        if self.normalise and self.distance == "cosine":
            raise ConfigError(
                "algo.normalise: a cosine does not grow with the number of features; leave it out"
            )


@builds(ProtonetConfig)
def protonet(problem: Problem, own: ProtonetConfig) -> Algorithm:
    """Learn features in which the examples of a class lie around their mean.

    The score of class k is −‖f(x) − c_k‖², where c_k is the mean of f over the support examples of
    the class (equations 1 and 2). Tasks may have any number of classes.

    `normalise=True, scale=1` is the head of MetaOptNet's code: −γ‖f(x) − c_k‖² / d, with γ learned.
    `distance="cosine"` takes cos(f(x), c_k), a choice that Snell et al. found worse; a softmax of
    cosines alone is nearly flat, so Meta-Baseline learns a factor from `scale=10` on.

    Args:
        problem: a classification; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a regression, or a model without features.
    """
    refuse_regression(problem, "protonet")
    start, embed = embedding(problem.model, "protonet")
    like = next(problem.model.parameters())

    def init() -> dict[str, Tensor]:
        return start | ({} if own.scale is None else {SCALE: like.new_tensor(own.scale)})

    def adapt(meta: Meta, support: Support) -> Predictor:
        prototypes = class_means(support)

        def scores(x: Tensor) -> Tensor:
            if own.distance == "cosine":
                return directions(x) @ directions(prototypes).T
            distances = squared_distances(x, prototypes)
            return -distances / x.shape[1] if own.normalise else -distances

        return scores if own.scale is None else lambda x: meta[SCALE] * scores(x)

    return at_once(problem, init, adapt, encode=embed, uneven=True)
