"""Model-Agnostic Meta-Learning (Finn, Abbeel and Levine 2017, algorithm 2)."""

from dataclasses import field
from functools import partial
from typing import ClassVar, Literal

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
    Problem,
    Steps,
    detached_parameters,
    refuse_frozen,
)
from metarun.components.algo.halves import halves
from metarun.components.algo.inner_loop import prepared
from metarun.config.checks import MOST_STEPS, at_least, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import (
    Evolution,
    GradientMode,
    Implicit,
    LossOptimizer,
    Meta,
    Params,
    RecordedLoss,
    Truncated,
    match_names,
    unroll,
)


@settings
class MamlConfig:
    """MAML (Finn et al. 2017)."""

    of_training: ClassVar[tuple[str, ...]] = ("order", "inner_steps", "multi_step_loss")

    order: Literal[1, 2] = 2  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    inner_steps: int = 1  # inner steps in training
    eval_inner_steps: int = 3  # inner steps in validation and test
    adapt: list[str] = field(default_factory=lambda: ["*"])  # patterns over parameter names
    reduction: Literal["mean", "per_shot"] = "mean"  # per_shot: sum over classes, mean over shots
    multi_step_loss: int = 0  # meta-steps in which losses after earlier inner steps count
    per_step: list[str] = field(default_factory=list)  # patterns: a value a step, not adapted

    def __post_init__(self) -> None:
        between("algo.inner_steps", self.inner_steps, 0, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        at_least("algo.multi_step_loss", self.multi_step_loss, 0)
        for key in ("per_step", "multi_step_loss"):
            if getattr(self, key) and not self.inner_steps:
                raise ConfigError(f"algo.{key} needs inner steps: raise algo.inner_steps")
        if not self.adapt:
            raise ConfigError("algo.adapt is empty: name what the inner loop adapts, e.g. ['*']")


@builds(MamlConfig)
def maml(problem: Problem, own: MamlConfig) -> Algorithm:
    """Learn initial weights from which a few inner steps solve a task.

    `maml(problem, inner_steps=3)` is `maml(problem, MamlConfig(inner_steps=3))`.

    Args:
        problem: model, objective and inner optimizer.
        own: the settings. Of them, `order=2` differentiates through the inner steps (as
            `problem.inner.gradient` says). What matches no pattern of `adapt` is meta-learned and
            shared by all tasks, but for what the model has frozen. `reduction="per_shot"` sums
            the inner loss over classes and averages it over shots, as MAML's reference code does,
            so that its learning rates mean the same here. What matches a pattern of `per_step` is
            learned with a value for each inner step of training, and not adapted: the loss of
            inner step i takes value i, predictions after step i do so as well, and later steps
            take the last one. For `*.norm.*` these are the γ and β of MAML++ (Antoniou, Edwards
            and Storkey 2019). `multi_step_loss` is theirs, too: see `weights_by_step`.

    Raises:
        ValueError: a pattern of `adapt` or of the inner groups matches no parameter or frozen
            ones only, the inner optimizer cannot serve the parameters or the gradient mode, or a
            hyperparameter is to be learned that is unknown or has no gradient in this mode.
    """
    model, objective, inner = problem.model, problem.objective, problem.inner
    weights = detached_parameters(model)
    refuse_frozen(model, own.adapt, "algo.adapt")
    refuse_frozen(model, inner.groups, "inner_opt.groups")
    per_step = match_names(weights, own.per_step) if own.per_step else []
    adapted = [name for name in match_names(weights, own.adapt) if name not in per_step]
    if not adapted:
        raise ValueError("algo.per_step leaves nothing to adapt")
    start = {name: weights[name] for name in adapted}
    steps = Steps(own.inner_steps, own.eval_inner_steps)
    loop = prepared(inner, start, steps)
    gradient: GradientMode = inner.gradient if own.order == 2 else "first_order"
    if isinstance(gradient, Implicit) and loop.initial:
        what = ", ".join(inner.learn) or f"the factors of {inner.precondition}"
        key = "learn empty" if inner.learn else "precondition out"
        raise ValueError(
            f"implicit gradients cannot learn {what} of the inner optimizer: leave "
            f"inner_opt.{key}, or choose another engine.gradient"
        )
    if gradient == "mixed" and isinstance(inner.optimizer, LossOptimizer):
        raise ValueError(
            "engine.gradient=mixed needs an inner optimizer that is driven by the gradient "
            "alone: choose engine.gradient=checkpoint"
        )
    if own.multi_step_loss and isinstance(gradient, Implicit | Evolution | Truncated):
        raise ValueError(
            "algo.multi_step_loss needs the derivative of each inner step: choose "
            "engine.gradient=reverse, first_order, checkpoint or mixed"
        )
    unlearned = isinstance(gradient, Implicit) or (
        isinstance(gradient, Truncated) and gradient.last < steps.training
    )
    if unlearned and (per_step or (inner.learn and "step" in inner.granularity)):
        what = "algo.per_step" if per_step else f"inner_opt.granularity={inner.granularity}"
        raise ValueError(
            f"{what}: this engine.gradient has no derivative of the earlier inner steps, so their "
            "values would never be learned; choose reverse, first_order, checkpoint or mixed"
        )
    model_halves = halves(model, [*adapted, *per_step], problem.inputs)
    scale = problem.outputs if own.reduction == "per_shot" else 1

    def inner_loss(fast: Params, given: tuple[Params, Tensor, Tensor]) -> Tensor:
        shared, encoded, y = given
        return scale * objective.loss(model_halves.decode({**shared, **fast}, encoded), y)

    recorded_loss = RecordedLoss(inner_loss, inner.record)

    def of_step(stacked: Params, step: int) -> Params:
        return {name: values[min(step, steps.training - 1)] for name, values in stacked.items()}

    def loss_of_step(
        fast: Params, step: int, given: tuple[Params, Params, Tensor, Tensor]
    ) -> Tensor:
        shared, stacked, encoded, y = given
        return inner_loss(fast, ({**shared, **of_step(stacked, step)}, encoded, y))

    def init() -> dict[str, Tensor]:
        stacked = {n: torch.stack([weights[n]] * steps.training) for n in per_step}
        return weights | stacked | loop.initial

    def adapt(meta: Meta, support: Support, taken: int, watch: Watch | None) -> Adapted:
        shared = {name: meta[name] for name in model_halves.shared}
        stacked = {name: meta[name] for name in per_step}
        watched = iter(range(taken + 1))  # steps before each look

        def predictor(fast: Params, after: int) -> Predictor:
            own = {**shared, **of_step(stacked, max(after - 1, 0)), **fast}
            return lambda encoded: model_halves.decode(own, encoded)

        unrolled = unroll(
            loss_of_step if per_step else recorded_loss,
            {name: meta[name] for name in adapted},
            loop.optimizer,
            taken,
            context=(shared, stacked, support.x, support.y)
            if per_step
            else (shared, support.x, support.y),
            hyper=loop.hyper(meta),
            gradient=gradient,
            observe=None if watch is None else lambda fast: watch(predictor(fast, next(watched))),
        )
        return Adapted(predictor(unrolled.params, taken), unrolled.losses, unrolled.observed)

    return by_steps(
        problem,
        init,
        adapt,
        steps,
        encode=model_halves.encode,
        adapted=tuple(adapted),
        weigh=partial(weights_by_step, steps.training, own.multi_step_loss)
        if own.multi_step_loss
        else None,
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
