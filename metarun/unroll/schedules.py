"""Hyperparameters that change over the inner steps; their ends may be learned.

A schedule is a function of the inner step (0, 1, …). `scheduled` puts schedules where `unroll`
takes hyperparameters. Values are numbers or tensors; results are differentiable with respect to
the tensors.

Example:
    >>> import torch
    >>> from metarun.unroll import cosine, scheduled, sgd, unroll
    >>> optimizer, first = sgd(), torch.tensor(0.4, requires_grad=True)
    >>> hyper = scheduled(optimizer.hyper, {"lr": cosine(first, 0.0, steps=4)})
    >>> end = unroll(lambda p, step: p["w"].sum(), {"w": torch.ones(1)}, optimizer, 4, hyper=hyper)
    >>> torch.autograd.grad(end.params["w"].sum(), first)
    (tensor(-2.5000),)
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from metarun.unroll.optim.base import Hyper, HyperValue

Value = float | Tensor
Schedule = Callable[[int], HyperValue]
"""The hyperparameter at an inner step 0, 1, …."""


def constant(value: Value) -> Schedule:
    """The same value at each step.

    Args:
        value: a number or tensor.

    Returns:
        The schedule t ↦ value.

    Example:
        >>> from metarun.unroll import constant
        >>> [constant(0.1)(step) for step in range(3)]
        [0.1, 0.1, 0.1]
    """
    return lambda step: value


def linear(start: Value, end: Value, steps: int) -> Schedule:
    """From `start` at step 0 in equal steps to `end` at step `steps`, and `end` from there on.

    Args:
        start, end: numbers or tensors.
        steps: inner steps from one to the other, 1 or more.

    Returns:
        The schedule t ↦ start + (end − start) · min(t, steps) / steps.

    Raises:
        ValueError: less than 1 step.

    Example:
        >>> from metarun.unroll import linear
        >>> [linear(1.0, 0.0, steps=4)(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check_count("steps", steps)

    def at(step: int) -> Value:
        return start + (end - start) * (min(step, steps) / steps)

    return at


def cosine(start: Value, end: Value, steps: int) -> Schedule:
    """From `start` at step 0 along half a cosine to `end` at step `steps`, and `end` from there.

    Args:
        start, end: numbers or tensors.
        steps: inner steps from one to the other, 1 or more.

    Returns:
        The schedule t ↦ end + (start − end) · (1 + cos(π · min(t, steps) / steps)) / 2.

    Raises:
        ValueError: less than 1 step.

    Example:
        >>> from metarun.unroll import cosine
        >>> [round(cosine(1.0, 0.0, steps=4)(step), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    References:
        Loshchilov and Hutter 2017, SGDR: stochastic gradient descent with warm restarts,
        equation 5, without restarts.
    """
    _check_count("steps", steps)

    def at(step: int) -> Value:
        return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * min(step, steps) / steps))

    return at


def exponential(start: Value, factor: Value) -> Schedule:
    """`start`, multiplied by `factor` at each step.

    Args:
        start, factor: numbers or tensors.

    Returns:
        The schedule t ↦ start · factorᵗ.

    Example:
        >>> from metarun.unroll import exponential
        >>> [exponential(1.0, 0.5)(step) for step in range(4)]
        [1.0, 0.5, 0.25, 0.125]
    """
    return step_decay(start, factor, 1)


def step_decay(start: Value, factor: Value, every: int) -> Schedule:
    """`start`, multiplied by `factor` once in `every` steps.

    Args:
        start, factor: numbers or tensors.
        every: inner steps between two changes, 1 or more.

    Returns:
        The schedule t ↦ start · factor^⌊t / every⌋.

    Raises:
        ValueError: `every` is less than 1.

    Example:
        >>> from metarun.unroll import step_decay
        >>> [step_decay(1.0, 0.5, every=2)(step) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
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

    Returns:
        A function of the step, for `unroll(hyper=...)`.

    Raises:
        ValueError: a schedule for what is no hyperparameter (if `hyper` is a function, when the
            result is called).

    Example:
        >>> from metarun.unroll import linear, scheduled, sgd
        >>> hyper = scheduled(sgd(momentum=0.9).hyper, {"lr": linear(0.4, 0.0, steps=4)})
        >>> hyper(2)["lr"], hyper(2)["momentum"]
        (0.2, 0.9)
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
