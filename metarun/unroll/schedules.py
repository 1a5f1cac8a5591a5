"""Hyperparameters that change over the inner steps; their ends may be learned.

A schedule is a function of the inner step (0, 1, …). `scheduled` puts schedules where `unroll`
takes hyperparameters::

    hyper = scheduled(optimizer.hyper, {"lr": cosine(0.4, 0.01, steps)})
    unroll(loss_fn, params, optimizer, steps, hyper=hyper)

Values are numbers or tensors; results are differentiable with respect to the tensors.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from metarun.unroll.optim.base import Hyper, HyperValue

Value = float | Tensor
Schedule = Callable[[int], HyperValue]


def constant(value: Value) -> Schedule:
    """The same value at each step."""
    return lambda step: value


def linear(start: Value, end: Value, steps: int) -> Schedule:
    """From `start` at step 0 in equal steps to `end` at step `steps`, and `end` from there on.

    Raises:
        ValueError: less than 1 step.
    """
    _check_count("steps", steps)

    def at(step: int) -> Value:
        return start + (end - start) * (min(step, steps) / steps)

    return at


def cosine(start: Value, end: Value, steps: int) -> Schedule:
    """From `start` at step 0 along half a cosine to `end` at step `steps`, and `end` from there.

    Loshchilov and Hutter 2017, equation 5, without restarts.

    Raises:
        ValueError: less than 1 step.
    """
    _check_count("steps", steps)

    def at(step: int) -> Value:
        return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * min(step, steps) / steps))

    return at


def exponential(start: Value, factor: Value) -> Schedule:
    """`start`, multiplied by `factor` at each step."""
    return step_decay(start, factor, 1)


def step_decay(start: Value, factor: Value, every: int) -> Schedule:
    """`start`, multiplied by `factor` once in `every` steps.

    Raises:
        ValueError: `every` is less than 1.
    """
    _check_count("every", every)

    def at(step: int) -> Value:
        decayed: Value = start * factor ** (step // every)
        return decayed

    return at


def scheduled(
    hyper: Hyper | Callable[[int], Hyper], schedules: Mapping[str, Schedule]
) -> Callable[[int], Hyper]:
    """Hyperparameters of which some follow a schedule, as a function of the step.

    Args:
        hyper: the others; or a function of the step that gives them.
        schedules: by name of the hyperparameter.

    Raises:
        ValueError: a schedule for what is no hyperparameter (if `hyper` is a function, when the
            result is called).
    """
    if not callable(hyper):
        _check_names(hyper, schedules)

    def at(step: int) -> Hyper:
        others = hyper(step) if callable(hyper) else hyper
        _check_names(others, schedules)
        return {**others, **{name: schedule(step) for name, schedule in schedules.items()}}

    return at


def _check_names(hyper: Hyper, schedules: Mapping[str, Schedule]) -> None:
    unknown = set(schedules) - set(hyper)
    if unknown:
        raise ValueError(
            f"no hyperparameter {', '.join(sorted(unknown))} to schedule; there are: "
            f"{', '.join(hyper)}"
        )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")
