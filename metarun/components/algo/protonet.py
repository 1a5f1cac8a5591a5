"""Prototypical networks (Snell, Swersky and Zemel 2017): the nearest mean of a class."""

from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.embedding import embedding
from metarun.config.component import builds, settings
from metarun.unroll import Meta


@settings
class ProtonetConfig:
    """Prototypical networks (Snell et al. 2017): the nearest mean of a class; no inner loop."""


@builds(ProtonetConfig)
def protonet(problem: Problem, own: ProtonetConfig) -> Algorithm:
    """Learn features in which the examples of a class lie around their mean.

    The score of class k is −‖f(x) − c_k‖², where c_k is the mean of f over the support examples of
    the class (equations 1 and 2). Tasks may have any number of classes.

    Args:
        problem: a classification; of the model, the features.
        own: there is nothing to set.

    Raises:
        ValueError: a regression, or a model without features.
    """
    if problem.ways is None:
        raise ValueError("algo=protonet tells classes apart: choose data that have classes")
    start, embed = embedding(problem.model, "protonet")

    def adapt(meta: Meta, support: Support) -> Predictor:
        members = one_hot(support)
        prototypes = members.T @ support.x / members.sum(0)[:, None]

        def predict(x: Tensor) -> Tensor:
            distances: Tensor = (x[:, None] - prototypes).square().sum(-1)
            return -distances

        return predict

    return at_once(problem, lambda: dict(start), adapt, encode=embed)
