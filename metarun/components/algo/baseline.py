"""Baseline (Chen et al. 2019): an ordinary classifier, and a new linear head for each task."""

from typing import ClassVar

from torch import Tensor

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.head_fitting import with_new_heads
from metarun.components.algo.pretraining import linear_scores, pretraining
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.unroll import Meta


@settings
class BaselineConfig:
    """Baseline (Chen et al. 2019): an ordinary classifier, and a new linear head for each task."""

    of_training: ClassVar[tuple[str, ...]] = ("batch_size",)

    batch_size: int = 16  # examples of a plain batch; a meta-step has trainer.meta_batch of them
    eval_inner_steps: int = 100  # steps of the new head
    inner_batch: int | None = None  # support examples of such a step; null: all

    def __post_init__(self) -> None:
        between("algo.batch_size", self.batch_size, 1, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        if self.inner_batch is not None:
            between("algo.inner_batch", self.inner_batch, 1, MOST_STEPS)


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

    return with_new_heads(
        problem,
        pretrained,
        head,
        linear_scores,
        batch_size=own.batch_size,
        steps=own.eval_inner_steps,
        inner_batch=own.inner_batch,
    )
