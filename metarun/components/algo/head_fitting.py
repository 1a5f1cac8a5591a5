"""A new head for each task, fitted to the fixed features of a pre-trained network."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metarun.components.algo.adapting import Adapted, Predictor, Support, Watch, by_steps
from metarun.components.algo.base import Algorithm, Problem, Steps
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.minibatches import minibatches
from metarun.components.algo.pretraining import Pretraining, Scores
from metarun.unroll import Meta, Params, unroll


def with_new_heads(
    problem: Problem,
    pretrained: Pretraining,
    head: Callable[[Meta, int], dict[str, Tensor]],
    scores: Scores,
    *,
    batch_size: int,
    steps: int,
    inner_batch: int | None = None,
    kept: dict[str, Tensor] | None = None,
) -> Algorithm:
    """Pre-train; for a task, fit a head by the inner optimizer, on features that stay as they are.

    Args:
        problem: what it is built for.
        pretrained: the classifier.
        head: `head(meta, way)`, the head that a task starts with.
        scores: of such a head and of features.
        batch_size: examples of a plain batch.
        steps: inner steps.
        inner_batch: support examples of an inner step; None: all.
        kept: meta-parameters that are not learned, by name, with their values.

    Raises:
        ValueError: inner hyperparameters are to be learned, of which nothing is differentiated.
    """
    objective, inner, fixed = problem.objective, problem.inner, kept or {}
    start = pretrained.start | fixed
    assert problem.ways is not None
    count = Steps(0, steps)
    loop = prepared(inner, head(start, problem.ways[1]), count)

    def loss(meta: Meta, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        value, extra = pretrained.loss(meta, batch)
        extra["kept"] = extra["kept"] | {name: meta[name].detach() for name in fixed}
        return value, extra

    def adapt(meta: Meta, support: Support, taken: int, watch: Watch | None) -> Adapted:
        assert support.way is not None
        features = support.x.detach()
        turns = minibatches(len(features), inner_batch, taken)

        def predictor(fast: Params) -> Predictor:
            return lambda x: scores(fast, x)

        def inner_loss(fast: Params, step: int, given: tuple[Tensor, Tensor]) -> Tensor:
            x, y = given
            if turns is not None:
                chosen = turns[step].to(x.device)
                x, y = x[chosen], y[chosen]
            return objective.loss(scores(fast, x), y)

        end = unroll(
            inner_loss,
            head(meta, support.way),
            inner.optimizer,
            taken,
            context=(features, support.y),
            hyper=loop.hyper(meta),
            gradient="first_order",
            observe=None if watch is None else lambda fast: watch(predictor(fast)),
        )
        return Adapted(predictor(end.params), end.losses, end.observed)

    made = by_steps(
        problem,
        lambda: pretrained.start | {name: value.clone() for name, value in fixed.items()},
        adapt,
        count,
        encode=pretrained.embed,
        loss=loss,
        kept=tuple(fixed),
        batch_size=batch_size,
        differentiates=False,
        averages=True,
    )
    return made._replace(any_way=True)
