"""The inner loop as a config asks for it: its optimizer, what of it is learned, its gradient."""

from typing import Any

from metarun.components.algo.base import InnerLoop, InnerSchedule
from metarun.components.algo.descent import DescentConfig
from metarun.components.contract import check_inner_optimizer
from metarun.components.inner_opt.base import OF_EVERY_INNER_OPTIMIZER
from metarun.config.catalogue import build_component
from metarun.config.component import as_keywords
from metarun.config.run import TrainConfig
from metarun.errors import ConfigError
from metarun.unroll import (
    Checkpoint,
    Evolution,
    GradientMode,
    Implicit,
    InnerOptimizer,
    LossOptimizer,
    Record,
    Truncated,
)


def inner_loop_of(config: TrainConfig, record: Record) -> InnerLoop:
    """The inner loop of a run.

    Args:
        record: applied to what is computed at each inner step.

    Raises:
        ConfigError: the settings of the optimizer or of the gradient contradict.
    """
    inner, optimizer = config.inner_opt, build_inner_optimizer(config)
    check_inner_optimizer(inner.name, optimizer)
    groups = {
        group["params"]: {k: v for k, v in group.items() if k != "params"} for group in inner.groups
    }
    return InnerLoop(
        optimizer,
        tuple(inner.learn),
        inner.granularity,
        groups,
        _gradient_mode(config),
        record,
        _inner_schedule(inner),
        vars(inner).get("precondition"),
    )


def build_inner_optimizer(config: TrainConfig) -> InnerOptimizer | LossOptimizer:
    """The inner optimizer, without what is learned of it and without groups.

    Raises:
        ConfigError: its settings contradict.
    """
    own = as_keywords(config.inner_opt, *OF_EVERY_INNER_OPTIMIZER)
    optimizer: InnerOptimizer | LossOptimizer = build_component(
        "inner_opt", config.inner_opt, **own
    )
    return optimizer


def _inner_schedule(config: Any) -> InnerSchedule | None:
    """How the inner learning rate falls; newton and partition have no such setting."""
    own = vars(config)
    if (kind := own.get("schedule")) is None:
        return None
    return InnerSchedule(kind, own["min_lr"], own["schedule_steps"])


def _gradient_mode(config: TrainConfig) -> GradientMode:
    engine = config.engine
    if engine.gradient == "auto":
        return "reverse"
    first_order = isinstance(config.algo, DescentConfig) and config.algo.order == 1
    if first_order and engine.gradient != "first_order":
        raise ConfigError(
            f"engine.gradient={engine.gradient}: algo.order=1 means first_order; leave out one"
        )
    modes: dict[str, GradientMode] = {
        "reverse": "reverse",
        "first_order": "first_order",
        "mixed": "mixed",
        "truncated": Truncated(engine.last),
        "checkpoint": Checkpoint(engine.block),
        "implicit": Implicit(
            engine.proximal,
            engine.solver,
            engine.solver_steps,
            engine.solver_lr,
        ),
        "evolution": Evolution(engine.samples, engine.sigma),
    }
    return modes[engine.gradient]
