"""Baseline (Chen et al. 2019): an ordinary classifier, and a new linear head for each task."""

from torch import Tensor

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.head_fitting import HeadFittingConfig, with_new_heads
from metarun.components.algo.pretraining import linear_scores, pretraining
from metarun.config.component import builds, settings
from metarun.unroll import Meta


@settings
class BaselineConfig(HeadFittingConfig):
    """Baseline (Chen et al. 2019): an ordinary classifier, and a new linear head for each task."""


@builds(BaselineConfig)
def baseline(problem: Problem, own: BaselineConfig) -> Algorithm:
    """Learn to tell all training classes apart, then fit a head on fixed features.

    Training minimises the cross entropy of a linear classifier over all training classes, on plain
    batches. For a task, a linear head starts at zero, and the inner optimizer takes
    `eval_inner_steps` steps with all support examples, or with minibatches of `inner_batch`: 100
    of 4 in the paper. (Its code takes 100 epochs of such, and starts at random.)

    Args:
        problem: a classification with labelled training images; of the model, the features.
        own: the settings.

    Raises:
        ValueError: there are no labelled images, the model has no features, or inner
            hyperparameters are to be learned, of which nothing is differentiated.
    """
    pretrained = pretraining(problem, "baseline")
    like = next(problem.model.parameters())

    def head(meta: Meta, way: int) -> dict[str, Tensor]:
        return {"weight": like.new_zeros(way, pretrained.width), "bias": like.new_zeros(way)}

    return with_new_heads(problem, own, "baseline", pretrained, head, linear_scores)
