"""A new head for each task, fitted to the fixed features of a pre-trained network."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metarun.components.algo.adapting import Adapted, Predictor, Support, Watch, by_steps
from metarun.components.algo.base import Algorithm, Problem, Steps
from metarun.components.algo.fitting import fitted
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.minibatches import minibatches
from metarun.components.algo.padding import refuse_rows_together, support_outputs
from metarun.components.algo.pretraining import Pretraining, PretrainingConfig, Scores
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import settings
from metarun.unroll import Meta, Params


@settings
class HeadFittingConfig(PretrainingConfig):
    """What every algorithm has that fits a new head to fixed features."""

    eval_inner_steps: int = 100  # steps of the new head
    inner_batch: int | None = None  # support examples of such a step; null: all

    def __post_init__(self) -> None:
        super().__post_init__()
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        if self.inner_batch is not None:
            between("algo.inner_batch", self.inner_batch, 1, MOST_STEPS)


def with_new_heads(
    problem: Problem,
    own: HeadFittingConfig,
    algo: str,
    pretrained: Pretraining,
    head: Callable[[Meta, int], dict[str, Tensor]],
    scores: Scores,
    kept: dict[str, Tensor] | None = None,
) -> Algorithm:
    """Pre-train; for a task, fit a head by the inner optimizer, on features that stay as they are.

    Args:
        problem: what it is built for.
        own: the settings.
        algo: the algorithm's name, for messages.
        pretrained: the classifier.
        head: `head(meta, way)`, the head that a task starts with.
        scores: of such a head and of features.
        kept: meta-parameters that are not learned, by name, with their values.

    Raises:
        ValueError: inner hyperparameters are to be learned, of which nothing is differentiated;
            or tasks are uneven, and the inner optimizer moves the rows of a head together.
    """
    objective, fixed = problem.objective, kept or {}
    start = pretrained.start | fixed
    assert problem.ways is not None
    refuse_rows_together(problem, algo, head(start, problem.ways[1]), {})
    count = Steps(0, own.eval_inner_steps)
    loop = prepared(problem.inner, head(start, problem.ways[1]), count)

    def loss(meta: Meta, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        value, extra = pretrained.loss(meta, batch)
        extra["kept"] = extra["kept"] | {name: meta[name].detach() for name in fixed}
        return value, extra

    def adapt(meta: Meta, support: Support, taken: int, watch: Watch | None) -> Adapted:
        assert support.way is not None
        features = support.x.detach()
        turns = minibatches(len(features), own.inner_batch, taken, features.device)

        def predictor(fast: Params) -> Predictor:
            return lambda x: scores(fast, x)

        def inner_loss(fast: Params, step: int, given: tuple[Tensor, Tensor]) -> Tensor:
            x, y = given
            if turns is not None:
                x, y = x[turns[step]], y[turns[step]]
            return objective.loss(support_outputs(problem, lambda: scores(fast, x), y), y)

        begun, given = head(meta, support.way), (features, support.y)
        return fitted(loop, meta, begun, inner_loss, given, predictor, taken, watch)

    made = by_steps(
        problem,
        lambda: pretrained.start | {name: value.clone() for name, value in fixed.items()},
        adapt,
        count,
        encode=pretrained.embed,
        loss=loss,
        kept=tuple(fixed),
        batch_size=own.batch_size,
        differentiates=False,
        averages=True,
        uneven=own.inner_batch is None,  # whose deck holds all examples, padding as well
    )
    return made._replace(any_way=True, uneven_with="algo.inner_batch=null")
