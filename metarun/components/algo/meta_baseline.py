"""Meta-Baseline (Chen et al. 2021): the nearest class mean by its cosine, learned from episodes."""

from typing import ClassVar

from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once
from metarun.components.algo.base import OWN_PREFIX, Algorithm, Problem
from metarun.components.algo.comparing import class_means, directions, refuse_regression
from metarun.components.algo.embedding import embedding
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.unroll import Meta

TEMPERATURE = OWN_PREFIX + "temperature"


@settings
class MetaBaselineConfig:
    """Meta-Baseline (Chen et al. 2021): the nearest class mean by its cosine."""

    of_training: ClassVar[tuple[str, ...]] = ("temperature",)

    temperature: float = 10.0  # initial factor τ of the cosines; learned

    def __post_init__(self) -> None:
        positive("algo.temperature", self.temperature)


@builds(MetaBaselineConfig)
def meta_baseline(problem: Problem, own: MetaBaselineConfig) -> Algorithm:
    """Learn features and a temperature by which cosines to class means tell classes apart.

    The score of class k is τ·cos(f(x), w_k), where w_k is the mean of f over the support examples
    of the class, not scaled before (equations 1 and 3). τ is learned. Tasks may have any number of
    classes.

    This is the paper's second stage. Its first one trains f as an ordinary classifier
    (Classifier-Baseline), and gives most of its accuracy; here f starts from random weights.

    Args:
        problem: a classification; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a regression, or a model without features.
    """
    refuse_regression(problem, "meta_baseline")
    start, embed = embedding(problem.model, "meta_baseline")
    like = next(problem.model.parameters())

    def init() -> dict[str, Tensor]:
        return start | {TEMPERATURE: like.new_tensor(own.temperature)}

    def adapt(meta: Meta, support: Support) -> Predictor:
        means = directions(class_means(support))
        return lambda x: meta[TEMPERATURE] * (directions(x) @ means.T)

    return at_once(problem, init, adapt, encode=embed, uneven=True)
