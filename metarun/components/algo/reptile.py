"""Reptile (Nichol, Achiam and Schulman 2018): move the start towards where the inner steps end."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.components.algo.adapting import (
    Adapted,
    Predictor,
    Support,
    Watch,
    by_steps,
)
from metarun.components.algo.base import (
    Algorithm,
    Episode,
    Problem,
    Steps,
    apply_model,
    detached_parameters,
)
from metarun.components.algo.carried import carried_state
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.minibatches import minibatches
from metarun.components.algo.normalising import Normalising
from metarun.components.algo.padding import Known, known, support_outputs, without_absent
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, Meta, Params, Unrolled, unroll


@settings
class ReptileConfig:
    """Reptile (Nichol et al. 2018): move the start towards where the inner steps end."""

    of_training: ClassVar[tuple[str, ...]] = ("inner_steps",)

    inner_steps: int = 5  # inner steps in training
    eval_inner_steps: int = 50  # inner steps in validation and test
    inner_batch: int | None = None  # support examples of an inner step; null: all
    keep_moments: bool = True  # the inner optimizer's state goes on from task to task

    def __post_init__(self) -> None:
        between("algo.inner_steps", self.inner_steps, 1, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        if self.inner_batch is not None:
            between("algo.inner_batch", self.inner_batch, 1, MOST_STEPS)


@builds(ReptileConfig)
def reptile(problem: Problem, own: ReptileConfig) -> Algorithm:
    """Learn a start θ from which inner steps lead to φ, by the gradient θ − φ.

    The outer loss is θ·stop(θ − φ), summed over parameters; its gradient by θ is θ − φ (algorithm
    2). The queries of training tasks are looked at for the log alone. No derivative passes
    through the inner steps.

    With `keep_moments`, the state of the inner optimizer (Adam's second moments) is not reset, as
    in the reference code. That takes tasks one after the other; here the tasks of a meta-batch
    begin with the same state, and the mean of what they end with goes on. An evaluation begins
    with it, too, and leaves it as it is.

    Args:
        problem: model, objective and inner optimizer; all parameters are adapted.
        own: the settings.

    Raises:
        ValueError: inner hyperparameters are to be learned, of which nothing is differentiated, or
            the inner optimizer needs more of the loss than its gradient.
    """
    model, objective, inner = problem.model, problem.objective, problem.inner
    if not isinstance(inner.optimizer, InnerOptimizer):
        raise ValueError("algo=reptile needs an inner optimizer that takes gradients alone")
    weights, normalising = detached_parameters(model), Normalising(problem.norm, model)
    count = Steps(own.inner_steps, own.eval_inner_steps)
    loop, moments = prepared(inner, weights, count), carried_state(inner.optimizer, weights)
    names = tuple(moments.initial) if own.keep_moments else ()

    def init() -> dict[str, Tensor]:
        return dict(weights) | {name: moments.initial[name].clone() for name in names}

    def walk(
        meta: Meta, support: Support, steps: int, observe: Callable[[Params], Any] | None
    ) -> Unrolled:
        start = {name: meta[name].detach() for name in weights}
        state = moments.state(meta if own.keep_moments else moments.initial)
        turns = minibatches(len(support.x), own.inner_batch, steps, support.x.device)

        def loss(fast: Params, step: int, given: tuple[Tensor, Tensor]) -> Tensor:
            x, y = given
            if turns is not None:
                x, y = x[turns[step]], y[turns[step]]
            outputs = support_outputs(problem, lambda: apply_model(model, fast, x), y)
            return objective.loss(outputs, y)

        return unroll(
            loss,
            start,
            inner.optimizer,
            steps,
            context=(support.x, support.y),
            hyper=loop.hyper(meta),
            state=state,
            gradient="first_order",
            observe=observe,
        )

    def predictor(fast: Params) -> Predictor:
        return lambda x: apply_model(model, fast, x)

    def adapt(meta: Meta, support: Support, steps: int, watch: Watch | None) -> Adapted:
        observe = None if watch is None else lambda fast: watch(predictor(fast))
        end = walk(meta, support, steps, observe)
        return Adapted(predictor(end.params), end.losses, end.observed)

    def loss(meta: Meta, episode: Episode) -> tuple[Tensor, dict[str, Any]]:
        way = None if problem.ways is None else problem.ways[0]
        support = Support(episode.support_x, episode.support_y, way)
        end = walk(meta, support, own.inner_steps, None)
        ended = {name: value.detach() for name, value in end.params.items()}
        queries, shown = episode.query_x, predictor(ended)
        own_examples = Known()
        if problem.uneven:
            own_examples = Known(known(episode.support_y), known(episode.query_y))
        outputs = normalising.outputs(
            shown, meta, queries, episode.support_x, False, own_examples
        ).detach()
        if problem.uneven:
            outputs = without_absent(outputs, episode.support_y)
        moved = [(meta[n] * (meta[n].detach() - ended[n])).sum() for n in weights]
        extra: dict[str, Any] = {
            "loss": objective.loss(outputs, episode.query_y),
            "score": objective.score(outputs, episode.query_y),
            "inner_losses": end.losses.detach(),
        }
        if own.keep_moments:
            extra["kept"] = moments.values(end.state)
        return torch.stack(moved).sum(), extra

    made = by_steps(
        problem,
        init,
        adapt,
        count,
        adapted=tuple(weights),
        loss=loss,
        kept=names,
        differentiates=False,
        uneven=own.inner_batch is None,  # whose deck holds all examples, padding as well
    )
    return made._replace(uneven_with="algo.inner_batch=null")
