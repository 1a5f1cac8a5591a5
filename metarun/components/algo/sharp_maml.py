"""Sharp-MAML (Abbas, Xiao, Chen, Chen and Chen 2022): sharpness-aware inner and outer steps."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.descent import DescentConfig, descend
from metarun.components.algo.maml import MamlConfig, fast_weights
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import (
    Hyper,
    Implicit,
    InnerOptimizer,
    LossOptimizer,
    Params,
    RecordedLoss,
    State,
    Truncated,
    Unrolled,
    unroll,
)
from metarun.unroll.optim import safe_sqrt

CLIMBS = "climbs"


@settings
class SharpMamlConfig(MamlConfig):
    """Sharp-MAML (Abbas et al. 2022): gradients from uphill, in inner and outer steps."""

    of_training: ClassVar[tuple[str, ...]] = (*DescentConfig.of_training, "outer_radius")

    eval_inner_steps: int = 1  # inner steps in validation and test
    inner_radius: float = 0.0005  # how far uphill an inner step takes its gradient; 0: not
    outer_radius: float = 0.0005  # the same for the outer step; 0: not

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algo.inner_radius", self.inner_radius, 0)
        at_least("algo.outer_radius", self.outer_radius, 0)
        if not self.inner_radius and not self.outer_radius:
            raise ConfigError(
                "algo.inner_radius and algo.outer_radius are 0: raise one, or choose algo=maml"
            )
        if self.inner_radius and not (self.inner_steps or self.eval_inner_steps):
            raise ConfigError("algo.inner_radius needs inner steps: raise algo.inner_steps")


@builds(SharpMamlConfig)
def sharp_maml(problem: Problem, own: SharpMamlConfig) -> Algorithm:
    """MAML whose steps go down the gradient of a place uphill (SAM, Foret et al. 2021).

    An inner step from φ takes the gradient at φ + α ∇L(φ)/‖∇L(φ)‖, in evaluations as well; the
    outer step takes that of a meta-batch at θ + α ∇F(θ)/‖∇F(θ)‖, with F the mean outer loss. The
    norms are over all that is adapted, and over all that is learned. Both together are
    "Sharp-MAML (both)", one alone "lower" or "upper". Of second order, the derivative passes
    through the inner climb, as in the reference code; none passes through the outer one. Costs
    are twice those of MAML for each of the two.

    The reference code has one α for both. It keeps the network of the best training batch; here
    the best by validation is kept, as for all algorithms. ASAM, its other norm, is left out.

    Raises:
        ValueError: an inner optimizer that takes more than the gradient, or implicit gradients,
            where the inner steps are to climb; see `maml`.
    """
    fast = fast_weights(problem, own)
    if not own.inner_radius:
        return descend(problem, own, fast)._replace(outer_radius=own.outer_radius)
    if isinstance(problem.inner.optimizer, LossOptimizer):
        raise ValueError(
            "algo.inner_radius needs an inner optimizer that is driven by the gradient alone, such "
            "as sgd: choose another inner_opt, or algo.inner_radius=0"
        )
    if own.order == 2 and isinstance(problem.inner.gradient, Implicit):
        raise ValueError(
            "engine.gradient=implicit knows nothing of the path that algo.inner_radius changes: "
            "choose reverse, or algo.inner_radius=0"
        )
    made = descend(problem, own, fast, partial(_climbing, own.inner_radius))
    return made._replace(outer_radius=own.outer_radius)


def _climbing(
    radius: float,
    loss: RecordedLoss | Callable[..., Tensor],
    start: Params,
    optimizer: InnerOptimizer,
    steps: int,
    *,
    hyper: Callable[[int], Hyper],
    gradient: Any,
    observe: Callable[[Params], Any] | None,
    **given: Any,
) -> Unrolled:
    """Each inner step as two: one uphill, and one from where that began, by the gradient there."""
    turns = count()
    if not isinstance(loss, RecordedLoss):
        loss = partial(_of_whole_step, loss)
    if isinstance(gradient, Truncated):
        gradient = Truncated(2 * gradient.last)
    end = unroll(
        loss,
        start,
        _there_and_back(optimizer, radius),
        2 * steps,
        hyper=lambda step: {**hyper(step // 2), CLIMBS: 1.0 - step % 2},
        gradient=gradient,
        observe=None if observe is None else lambda at: None if next(turns) % 2 else observe(at),
        **given,
    )
    return Unrolled(end.params, end.state[0], end.losses[::2], end.observed[::2])


def _of_whole_step(loss: Callable[..., Tensor], params: Params, step: int, given: Any) -> Tensor:
    return loss(params, step // 2, given)


def _there_and_back(optimizer: InnerOptimizer, radius: float) -> InnerOptimizer:
    """An optimizer that climbs, and then takes the step of another from where it climbed."""

    def update(grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        inner, home = state
        if hyper[CLIMBS]:
            norm = safe_sqrt(torch.stack([g.square().sum() for g in grads.values()]).sum())
            far = radius / (norm + 1e-12)
            return {name: p + far * grads[name] for name, p in params.items()}, (inner, params)
        moved, inner = optimizer.update(grads, inner, home, hyper)
        return moved, (inner, moved)

    return InnerOptimizer(
        lambda params: (optimizer.init(params), params), update, {**optimizer.hyper, CLIMBS: 0.0}
    )
