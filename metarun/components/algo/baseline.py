"""Baseline (Chen et al. 2019): an ordinary classifier, and a new linear head for each task."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.adapting import (
    Adapted,
    Predictor,
    Support,
    Watch,
    by_steps,
)
from metarun.components.algo.base import Algorithm, Problem, Steps
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.pretraining import classifier
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.episodes.source import Batch
from metarun.unroll import Meta, Params, unroll


@settings
class BaselineConfig:
    """Baseline (Chen et al. 2019): an ordinary classifier, and a new linear head for each task."""

    of_training: ClassVar[tuple[str, ...]] = ("batch_size",)

    batch_size: int = 16  # examples of a plain batch; a meta-step has trainer.meta_batch of them
    eval_inner_steps: int = 100  # steps of the new head

    def __post_init__(self) -> None:
        between("algo.batch_size", self.batch_size, 1, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)


@builds(BaselineConfig)
def baseline(problem: Problem, own: BaselineConfig) -> Algorithm:
    """Learn to tell all training classes apart, then fit a head on fixed features.

    Training minimises the cross entropy of a linear classifier over all training classes, on plain
    batches. For a task, a linear head starts at zero, and the inner optimizer takes
    `eval_inner_steps` steps with all support examples. (The reference code draws batches of 4 and
    starts at random.)

    Args:
        problem: a classification with labelled training images; of the model, the features.
        own: the settings.

    Raises:
        ValueError: there are no labelled images, the model has no features, or inner
            hyperparameters are to be learned, of which nothing is differentiated.
    """
    inner, objective = problem.inner, problem.objective
    start, embed, width, classify = classifier(problem, "baseline")
    like = next(iter(start.values()))
    like_a_head = {"weight": like.new_zeros(1, width), "bias": like.new_zeros(1)}
    loop = prepared(inner, like_a_head, Steps(0, own.eval_inner_steps))

    def init() -> dict[str, Tensor]:
        return dict(start)

    def loss(meta: Meta, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        return classify(meta, embed(meta, batch.x), batch.y)

    def adapt(meta: Meta, support: Support, steps: int, watch: Watch | None) -> Adapted:
        assert support.way is not None
        features = support.x.detach()
        head = {
            "weight": features.new_zeros(support.way, width),
            "bias": features.new_zeros(support.way),
        }

        def predictor(fast: Params) -> Predictor:
            return lambda x: F.linear(x, fast["weight"], fast["bias"])

        end = unroll(
            lambda fast, step, given: objective.loss(predictor(fast)(given[0]), given[1]),
            head,
            inner.optimizer,
            steps,
            context=(features, support.y),
            hyper=loop.hyper(meta),
            gradient="first_order",
            observe=None if watch is None else lambda fast: watch(predictor(fast)),
        )
        return Adapted(predictor(end.params), end.losses, end.observed)

    steps = Steps(0, own.eval_inner_steps)
    made = by_steps(
        problem,
        init,
        adapt,
        steps,
        encode=embed,
        loss=loss,
        batch_size=own.batch_size,
        differentiates=False,
    )
    return made._replace(any_way=True)
