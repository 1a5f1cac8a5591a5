"""Model-Agnostic Meta-Learning (Finn, Abbeel and Levine 2017, algorithm 2)."""

from dataclasses import field
from typing import Literal

from torch import Tensor

from metarun.components.algo.adapting import (
    Adapted,
    Predictor,
    Steps,
    Support,
    Watch,
    by_steps,
)
from metarun.components.algo.base import (
    Algorithm,
    Problem,
    detached_parameters,
    refuse_frozen,
)
from metarun.components.algo.halves import halves
from metarun.components.algo.inner_loop import prepared
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import (
    GradientMode,
    Implicit,
    LossOptimizer,
    Meta,
    Params,
    RecordedLoss,
    match_names,
    unroll,
)


@settings
class MamlConfig:
    """MAML (Finn et al. 2017)."""

    order: Literal[1, 2] = 2  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    inner_steps: int = 1  # inner steps in training
    eval_inner_steps: int = 3  # inner steps in validation and test
    adapt: list[str] = field(default_factory=lambda: ["*"])  # patterns over parameter names
    reduction: Literal["mean", "per_shot"] = "mean"  # per_shot: sum over classes, mean over shots

    def __post_init__(self) -> None:
        between("algo.inner_steps", self.inner_steps, 0, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
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
            so that its learning rates mean the same here.

    Raises:
        ValueError: a pattern of `adapt` or of the inner groups matches no parameter or frozen
            ones only, the inner optimizer cannot serve the parameters or the gradient mode, or a
            hyperparameter is to be learned that is unknown or has no gradient in this mode.
    """
    model, objective, inner = problem.model, problem.objective, problem.inner
    weights = detached_parameters(model)
    refuse_frozen(model, own.adapt, "algo.adapt")
    refuse_frozen(model, inner.groups, "inner_opt.groups")
    adapted = match_names(weights, own.adapt)
    start = {name: weights[name] for name in adapted}
    steps = Steps(own.inner_steps, own.eval_inner_steps)
    loop = prepared(inner, start, steps)
    gradient: GradientMode = inner.gradient if own.order == 2 else "first_order"
    if isinstance(gradient, Implicit) and loop.initial:
        what = ", ".join(inner.learn) or f"a {inner.precondition}"
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
    model_halves = halves(model, adapted, problem.inputs)
    scale = problem.outputs if own.reduction == "per_shot" else 1

    def inner_loss(fast: Params, given: tuple[Params, Tensor, Tensor]) -> Tensor:
        shared, encoded, y = given
        return scale * objective.loss(model_halves.decode({**shared, **fast}, encoded), y)

    recorded_loss = RecordedLoss(inner_loss, inner.record)

    def init() -> dict[str, Tensor]:
        return weights | loop.initial

    def adapt(meta: Meta, support: Support, steps: int, watch: Watch | None) -> Adapted:
        shared = {name: meta[name] for name in model_halves.shared}

        def predictor(fast: Params) -> Predictor:
            return lambda encoded: model_halves.decode({**shared, **fast}, encoded)

        unrolled = unroll(
            recorded_loss,
            {name: meta[name] for name in adapted},
            loop.optimizer,
            steps,
            context=(shared, support.x, support.y),
            hyper=loop.hyper(meta),
            gradient=gradient,
            observe=None if watch is None else lambda fast: watch(predictor(fast)),
        )
        return Adapted(predictor(unrolled.params), unrolled.losses, unrolled.observed)

    return by_steps(
        problem,
        init,
        adapt,
        steps,
        encode=model_halves.encode,
        adapted=tuple(adapted),
    )
