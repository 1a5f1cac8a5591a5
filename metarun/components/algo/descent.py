"""Inner loops that are differentiated: what MAML and its relatives have in common."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metarun.components.algo.adapting import (
    Adapted,
    Encode,
    Predictor,
    Support,
    Watch,
    by_steps,
)
from metarun.components.algo.base import Algorithm, InnerLoop, Problem, Steps
from metarun.components.algo.inner_loop import SECOND_ORDER, Prepared, prepared
from metarun.components.algo.padding import known, present, support_outputs
from metarun.components.backbone.norm import counting
from metarun.config.checks import MOST_STEPS, at_least, between
from metarun.config.component import settings
from metarun.errors import ConfigError
from metarun.unroll import (
    Checkpoint,
    Evolution,
    GradientMode,
    Implicit,
    LossOptimizer,
    Meta,
    Params,
    RecordedLoss,
    Truncated,
    Unrolled,
    unroll,
)


@settings
class DescentConfig:
    """What every algorithm has whose inner steps are differentiated."""

    of_training: ClassVar[tuple[str, ...]] = (
        "order",
        "inner_steps",
        "outer_reduction",
        "multi_step_loss",
        "first_order_until",
    )

    name: str = "???"
    order: Literal[1, 2] = 2  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    inner_steps: int = 1  # inner steps in training
    eval_inner_steps: int = 3  # inner steps in validation and test
    reduction: Literal["mean", "per_shot"] = "mean"  # per_shot: sum over classes, mean over shots
    outer_reduction: Literal["mean", "per_shot"] = "mean"  # per_shot: a sum, over the shots
    multi_step_loss: int = 0  # meta-steps in which losses after earlier inner steps count
    first_order_until: int = 0  # meta-steps of first order, before those of second order

    def __post_init__(self) -> None:
        between("algo.inner_steps", self.inner_steps, 0, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        at_least("algo.multi_step_loss", self.multi_step_loss, 0)
        at_least("algo.first_order_until", self.first_order_until, 0)
        for key in ("multi_step_loss", "first_order_until"):
            if getattr(self, key) and not self.inner_steps:
                raise ConfigError(f"algo.{key} needs inner steps: raise algo.inner_steps")
        if self.first_order_until and self.order == 1:
            raise ConfigError(
                f"algo.first_order_until={self.first_order_until}: algo.order=1 is first order "
                "throughout; leave out one"
            )


class Fast(NamedTuple):
    """What an inner loop adapts, and how.

    Attributes:
        initial: the initial meta-parameters, by name.
        like: tensors of the shapes of what is adapted, by name.
        start: `start(meta, support)` gives what is adapted before the first step.
        decode: `decode(params, encoded)` gives outputs, by what is adapted and what is shared.
        shared: names of the meta-parameters that `decode` needs besides.
        encode: applied to examples before that; see `by_steps`.
        per_step: names of those of `initial` that are learned with a value for each inner step.
        scale: factor of the outputs for queries.
    """

    initial: dict[str, Tensor]
    like: Params
    start: Callable[[Meta, Support], Params]
    decode: Callable[[Meta, Any], Tensor]
    shared: tuple[str, ...]
    encode: Encode = lambda meta, x: x
    per_step: tuple[str, ...] = ()
    scale: float = 1.0


def descend(
    problem: Problem, own: DescentConfig, fast: Fast, walk: Callable[..., Unrolled] = unroll
) -> Algorithm:
    """The algorithm that adapts by steps of the inner optimizer on the support loss.

    Raises:
        ValueError: the inner optimizer cannot serve the parameters or the gradient mode, or a
            hyperparameter is to be learned that is unknown or has no gradient in this mode.
    """
    objective, inner, per_step = problem.objective, problem.inner, fast.per_step
    steps = Steps(own.inner_steps, own.eval_inner_steps)
    loop = prepared(inner, fast.like, steps, anneals=own.first_order_until > 0)
    gradient: GradientMode = inner.gradient if own.order == 2 else "first_order"
    _check_gradient(gradient, inner, own, loop, bool(per_step))

    def inner_loss(params: Params, given: tuple[Params, Any, Tensor]) -> Tensor:
        shared, encoded, y = given
        decoded = support_outputs(problem, lambda: fast.decode({**shared, **params}, encoded), y)
        value = objective.loss(decoded, y)
        if own.reduction != "per_shot":
            return value
        way = decoded.shape[1]
        return value * (present(y, way).sum() if problem.uneven else way)

    recorded_loss = RecordedLoss(inner_loss, inner.record)

    def of_step(stacked: Params, step: int) -> Params:
        return {name: values[min(step, steps.training - 1)] for name, values in stacked.items()}

    def loss_of_step(
        params: Params, step: int, given: tuple[Params, Params, Any, Tensor]
    ) -> Tensor:
        shared, stacked, encoded, y = given
        return inner_loss(params, ({**shared, **of_step(stacked, step)}, encoded, y))

    def init() -> dict[str, Tensor]:
        stacked = {n: torch.stack([fast.initial[n]] * steps.training) for n in per_step}
        return fast.initial | stacked | loop.initial

    def adapt(meta: Meta, support: Support, taken: int, watch: Watch | None) -> Adapted:
        shared = {name: meta[name] for name in fast.shared}
        stacked = {name: meta[name] for name in per_step}
        watched = iter(range(taken + 1))  # steps before each look

        def predictor(params: Params, after: int) -> Predictor:
            every = {**shared, **of_step(stacked, max(after - 1, 0)), **params}
            if fast.scale == 1:
                return lambda encoded: fast.decode(every, encoded)
            return lambda encoded: fast.scale * fast.decode(every, encoded)

        with counting(support.known):
            start = fast.start(meta, support)
        unrolled = walk(
            loss_of_step if per_step else recorded_loss,
            start,
            loop.optimizer,
            taken,
            context=(shared, stacked, support.x, support.y)
            if per_step
            else (shared, support.x, support.y),
            hyper=loop.hyper(meta),
            gradient=gradient,
            observe=None if watch is None else lambda now: watch(predictor(now, next(watched))),
        )
        return Adapted(predictor(unrolled.params, taken), unrolled.losses, unrolled.observed)

    made = by_steps(
        problem,
        init,
        adapt,
        steps,
        encode=fast.encode,
        adapted=tuple(fast.like),
        uneven=True,
        weigh=partial(weights_by_step, steps.training, own.multi_step_loss)
        if own.multi_step_loss
        else None,
    )
    if own.outer_reduction == "per_shot":
        made = _summed_per_shot(made, problem)
    return _annealed(made, own.first_order_until) if own.first_order_until else made


def _summed_per_shot(made: Algorithm, problem: Problem) -> Algorithm:
    """The algorithm whose outer loss is the sum over queries, divided by the shots."""
    if problem.ways is None:
        return made
    way = problem.ways[0]

    def loss(meta: Meta, episode: Any, *step: Tensor) -> tuple[Tensor, dict[str, Any]]:
        value, extra = made.loss(meta, episode, *step)
        if problem.uneven:
            queries, examples = known(episode.query_y).sum(), known(episode.support_y).sum()
            return value * (queries * present(episode.support_y, way).sum() / examples), extra
        return value * (len(episode.query_y) * way / len(episode.support_y)), extra

    return made._replace(loss=loss)


def _annealed(made: Algorithm, until: int) -> Algorithm:
    """The algorithm whose training is of first order until a meta-step."""

    def loss(meta: Meta, episode: Any, step: Tensor) -> tuple[Tensor, dict[str, Any]]:
        given = (episode, step) if made.follows_step else (episode,)
        return made.loss({**meta, SECOND_ORDER: (step >= until).double()}, *given)

    return made._replace(loss=loss, follows_step=True)


def refuse_mixed(gradient: GradientMode, inner: InnerLoop) -> None:
    """Refuse `engine.gradient=mixed` with an inner optimizer that takes more than gradients.

    Raises:
        ValueError: says what to choose.
    """
    if gradient == "mixed" and isinstance(inner.optimizer, LossOptimizer):
        raise ValueError(
            "engine.gradient=mixed needs an inner optimizer that is driven by the gradient "
            "alone: choose engine.gradient=checkpoint"
        )


def _check_gradient(
    gradient: GradientMode, inner: InnerLoop, own: DescentConfig, loop: Prepared, per_step: bool
) -> None:
    """Refuse what a gradient mode cannot do, or would never learn."""
    if isinstance(gradient, Implicit) and loop.initial:
        what, instead = "what the algorithm learns", ""
        if inner.learn:
            what, instead = ", ".join(inner.learn), "leave inner_opt.learn empty, or "
        elif isinstance(inner.precondition, str):
            what = f"the factors of {inner.precondition}"
            instead = "leave inner_opt.precondition out, or "
        raise ValueError(
            f"implicit gradients cannot learn {what} of the inner optimizer: {instead}choose "
            "another engine.gradient"
        )
    refuse_mixed(gradient, inner)
    if own.multi_step_loss and isinstance(gradient, Implicit | Evolution | Truncated):
        raise ValueError(
            "algo.multi_step_loss needs the derivative of each inner step: choose "
            "engine.gradient=reverse, first_order, checkpoint or mixed"
        )
    second = gradient in ("reverse", "checkpoint") or isinstance(gradient, Checkpoint)
    if own.first_order_until and not second:
        raise ValueError(
            "algo.first_order_until changes from first to second order: choose "
            "engine.gradient=reverse or checkpoint, or leave it out"
        )
    unlearned = isinstance(gradient, Implicit) or (
        isinstance(gradient, Truncated) and gradient.last < own.inner_steps
    )
    if unlearned and (per_step or (inner.learn and "step" in inner.granularity)):
        what = "algo.per_step" if per_step else f"inner_opt.granularity={inner.granularity}"
        raise ValueError(
            f"{what}: this engine.gradient has no derivative of the earlier inner steps, so their "
            "values would never be learned; choose reverse, first_order, checkpoint or mixed"
        )


def weights_by_step(inner_steps: int, until: int, step: Tensor) -> Tensor:
    """How much the query loss after each inner step counts in MAML++'s multi-step loss.

    All count alike at first. Those of earlier steps fall linearly, to 0.03 of that; the last one
    takes the rest, and all of it from meta-step `until` on.

    Args:
        inner_steps: S of training.
        until: E, the meta-steps in which it falls.
        step: meta-steps done, a float64 tensor ().

    Returns:
        w_i = max((1 − step/E) / S, 0.03 / S) for i < S, and w_S = 1 − Σ w_i: float64, (S,).

    References:
        Antoniou, Edwards and Storkey 2019, "How to train your MAML", section 4; constants of their
        code.
    """
    earlier = ((1 - step / until) / inner_steps).clamp(min=0.03 / inner_steps)
    earlier = torch.where(step < until, earlier, torch.zeros_like(earlier))
    last = 1 - (inner_steps - 1) * earlier
    return torch.stack([*[earlier] * (inner_steps - 1), last])
