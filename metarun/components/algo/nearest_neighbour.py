"""Nearest neighbours in the space of raw inputs (Fix and Hodges 1951): nothing is learned."""

import torch
from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import Algorithm, Problem
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta


@settings
class NearestNeighbourConfig:
    """Nearest neighbours of raw inputs: a control, in which nothing is learned."""

    k: int = 1  # neighbours that vote

    def __post_init__(self) -> None:
        between("algo.k", self.k, 1, MOST_STEPS)


@builds(NearestNeighbourConfig)
def nearest_neighbour(problem: Problem, own: NearestNeighbourConfig) -> Algorithm:
    """Label a query as the `k` support examples do that are nearest by Euclidean distance.

    There is no network and nothing to learn, so a run has no meta-steps. The score of a class is
    its number of votes, plus 1 / (2 + 2d) for its nearest example at distance d: so votes decide,
    and of equal ones the nearer class wins. In a regression the output is the mean of the k
    targets. The loss of such scores means nothing beside that of a network.

    Args:
        problem: a classification or a regression; its model is not used.
        own: the settings.

    Raises:
        ValueError: the backbone is to normalise in some way, and there is none.
        ConfigError: at the first task, if it has fewer support examples than `k`.
    """
    if problem.norm != "transductive":
        raise ValueError(
            f"backbone.norm={problem.norm}: algo=nearest_neighbour uses no network; leave it out"
        )

    def adapt(meta: Meta, support: Support) -> Predictor:
        if own.k > len(support.x):
            raise ConfigError(
                f"algo.k={own.k}: a task has only {len(support.x)} support examples; lower it, or "
                "raise task.shot"
            )
        examples = support.x.flatten(1)
        targets = support.y if support.way is None else one_hot(support)

        def predict(x: Tensor) -> Tensor:
            # Not by matrix products, which round where two examples are nearly the same.
            exact = "donot_use_mm_for_euclid_dist"
            distances = torch.cdist(x.flatten(1), examples, compute_mode=exact)
            if support.known is not None:
                distances = distances.masked_fill(~support.known, torch.inf)
            chosen = targets[distances.topk(own.k, largest=False).indices]
            if support.way is None:
                return chosen.mean(1)
            others = torch.where(targets == 1, 0.0, torch.inf)  # (examples, way)
            nearest = (distances[:, :, None] + others).amin(1)
            return chosen.sum(1) + 0.5 / (1 + nearest)

        return predict

    few = own.k == 1  # of more, an uneven task may have fewer examples
    made = at_once(problem, dict, adapt, uneven=few)
    return made._replace(learns=False, uneven_with="algo.k=1")
