"""The inner optimizer as an algorithm uses it: what is learned of it, and how its rate falls."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.components.algo.base import HYPER_PREFIX, InnerLoop, Steps
from metarun.unroll import (
    KRONECKER,
    KRONECKER_PSD,
    META_CURVATURE,
    Hyper,
    InnerOptimizer,
    LossOptimizer,
    Meta,
    Params,
    cosine,
    group_hyper,
    learn_hyper,
    linear,
    precondition,
)

FACTOR_PREFIX = f"{HYPER_PREFIX}precondition."
"""Begins the names of a preconditioner's factors among the meta-parameters."""

RATE_PREFIX = f"{HYPER_PREFIX}rates."
"""Begins the names of the rates that each element of a parameter has."""

TENSORS = (FACTOR_PREFIX, RATE_PREFIX)
"""What names of hyperparameters begin with that are no scalars, nor have one a step."""

SECOND_ORDER = "algo.second_order"
"""Whether this meta-step is of second order: 0 or 1, beside the meta-parameters."""

PRECONDITIONERS = {
    "meta_curvature": META_CURVATURE,
    "kronecker": KRONECKER,
    "kronecker_psd": KRONECKER_PSD,
}
SCHEDULES = {"cosine": cosine, "linear": linear}


class Prepared(NamedTuple):
    """The inner optimizer of an algorithm.

    Attributes:
        optimizer: it, behind its preconditioner.
        initial: what is learned of it, by name among the meta-parameters.
        hyper: `hyper(meta)` gives its hyperparameters as a function of the inner step.
    """

    optimizer: InnerOptimizer | LossOptimizer
    initial: dict[str, Tensor]
    hyper: Callable[[Meta], Callable[[int], Hyper]]


def prepared(inner: InnerLoop, start: Params, steps: Steps, anneals: bool = False) -> Prepared:
    """The inner optimizer for parameters, as the settings of `inner_opt` ask for it.

    Args:
        inner: the optimizer, and what is learned of it.
        start: the parameters that are adapted.
        steps: inner steps. A schedule takes those of training, if there are any.
        anneals: whether meta-steps of first order come first; see `SECOND_ORDER`.

    Raises:
        ValueError: a pattern of the groups matches no parameter; the optimizer cannot serve the
            parameters; a hyperparameter is to be learned that it does not have; or the learning
            rate would be zero in some steps.
    """
    optimizer: InnerOptimizer | LossOptimizer = inner.optimizer
    factors: Collection[str] = ()
    if inner.precondition is not None:
        chosen = inner.precondition
        if isinstance(chosen, str):
            chosen = PRECONDITIONERS[chosen]
        factors = chosen.factors(start)
        optimizer = precondition(optimizer, chosen, start)
    optimizer.init(start)  # refuses parameters that it cannot serve, before a run begins
    hyper = group_hyper(optimizer.hyper, inner.groups, list(start))
    learned = learn_hyper(
        hyper, inner.learn, inner.granularity, start, steps.training, inner.groups
    )
    curved = learn_hyper(hyper, tuple(factors), "parameter", start, steps.training)
    if not steps.training and curved.initial:
        raise ValueError("inner_opt.precondition needs inner steps: raise algo.inner_steps")
    rates = _rates(inner, optimizer.hyper, start)
    falling = _schedule(inner, optimizer.hyper, steps)
    if anneals:
        optimizer = _annealed(optimizer)

    def of_meta(meta: Meta) -> Callable[[int], Hyper]:
        values = {key: meta[HYPER_PREFIX + key] for key in learned.initial}
        bent = {key: meta[FACTOR_PREFIX + key] for key in curved.initial}

        def at(step: int) -> Hyper:
            now = learned.at(values, step)
            if rates:
                now = {**now, "lr": {name: meta[RATE_PREFIX + name] for name in rates}}
            if factors:
                of_factors = curved.at(bent, step)
                now = {**now, **{name: of_factors[name] for name in factors}}
            now = falling(now, step)
            return {**now, _ORDER: meta.get(SECOND_ORDER, 1.0)} if anneals else now

        return at

    initial = {HYPER_PREFIX + key: value for key, value in learned.initial.items()}
    initial |= {FACTOR_PREFIX + key: value for key, value in curved.initial.items()}
    initial |= {RATE_PREFIX + name: value for name, value in rates.items()}
    return Prepared(optimizer, initial, of_meta)


def _rates(inner: InnerLoop, names: Hyper, start: Params) -> Params:
    """The learning rate that each element begins with, where each has one of its own."""
    if inner.rates is None:
        return {}
    if "lr" not in names:
        raise ValueError(
            "the algorithm learns a rate of each element, and the inner optimizer has no lr, only "
            f"{', '.join(names)}: choose another inner_opt, such as sgd"
        )
    if "lr" in inner.learn or any("lr" in own for own in inner.groups.values()):
        key = "learn" if "lr" in inner.learn else "groups"
        raise ValueError(
            f"inner_opt.{key}: the algorithm learns the rate of each element itself; leave lr out"
        )
    low, high = inner.rates
    return {name: low + (high - low) * torch.rand(p.shape).to(p) for name, p in start.items()}


_ORDER = "second_order"


def _annealed(optimizer: InnerOptimizer | LossOptimizer) -> InnerOptimizer:
    """The optimizer on gradients that are constants unless its setting `second_order` is true."""
    if isinstance(optimizer, LossOptimizer):
        raise ValueError(
            "algo.first_order_until needs an inner optimizer that is driven by the gradient alone, "
            "such as sgd: choose another inner_opt, or leave it out"
        )

    def update(grads: Params, state: Any, params: Params, hyper: Hyper) -> tuple[Params, Any]:
        second = hyper[_ORDER]
        if isinstance(second, Tensor):
            # The derivative of g times 0 or 1; the value is g, to the bit.
            grads = {n: g.detach() + second.to(g) * (g - g.detach()) for n, g in grads.items()}
        return optimizer.update(grads, state, params, hyper)

    return InnerOptimizer(optimizer.init, update, {**optimizer.hyper, _ORDER: 1.0})


def _schedule(inner: InnerLoop, names: Hyper, steps: Steps) -> Callable[[Hyper, int], Hyper]:
    """Hyperparameters with the learning rate of a step, from those with its first one."""
    chosen = inner.schedule
    if chosen is None:
        return lambda hyper, step: hyper
    if "lr" not in names:
        raise ValueError(f"inner_opt.schedule: the optimizer has no lr, only {', '.join(names)}")
    length = chosen.steps or steps.training or steps.evaluation
    longest = max(steps)
    if chosen.min_lr == 0 and longest > length:
        raise ValueError(
            f"inner_opt.schedule={chosen.kind}: the learning rate is zero after {length} inner "
            f"steps, and {longest} are taken; set inner_opt.min_lr, or "
            f"inner_opt.schedule_steps={longest}"
        )

    def falling(start: float | Tensor, step: int) -> float | Tensor:
        value = SCHEDULES[chosen.kind](start, chosen.min_lr, length)(step)
        assert not isinstance(value, Mapping)
        return value

    def at(hyper: Hyper, step: int) -> Hyper:
        rate = hyper["lr"]
        if not isinstance(rate, Mapping):
            return {**hyper, "lr": falling(rate, step)}
        return {**hyper, "lr": {name: falling(value, step) for name, value in rate.items()}}

    return at
