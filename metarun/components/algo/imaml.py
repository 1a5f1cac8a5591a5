"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019): the gradient at the end of the path."""

from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metarun.components.algo.base import OWN_PREFIX, Algorithm, Problem
from metarun.components.algo.descent import Fast, descend
from metarun.components.algo.maml import MamlConfig, fast_weights, maml
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import (
    Hyper,
    Implicit,
    InnerOptimizer,
    LossOptimizer,
    Meta,
    Params,
    RecordedLoss,
    Unrolled,
    unroll,
)
from metarun.unroll.gradients.implicit import attach_implicit

PROXIMAL = OWN_PREFIX + "proximal"

CG_DAMPING, LAMBDA_DAMPING = 1.0, 10.0
"""Constants of the reference code, which the paper does not have."""


@settings
class ImamlConfig:
    """iMAML (Rajeswaran et al. 2019): a proximal inner loop, differentiated implicitly."""

    of_training: ClassVar[tuple[str, ...]] = ("inner_steps", "learn_proximal")
    usual: ClassVar[dict[str, dict[str, Any]]] = {
        "engine": {"gradient": "implicit", "proximal": 2.0, "solver": "cg", "solver_steps": 5}
    }

    variant: Literal["paper", "code"] = "paper"  # code: the steps and the damping of theirs
    inner_steps: int = 16  # inner steps in training
    eval_inner_steps: int = 16  # inner steps in validation and test
    learn_proximal: bool = False  # λ becomes a meta-parameter, as its logarithm
    adapt: list[str] = field(default_factory=lambda: ["*"])  # patterns over parameter names
    reduction: Literal["mean", "per_shot"] = "mean"  # per_shot: sum over classes, mean over shots

    def __post_init__(self) -> None:
        between("algo.inner_steps", self.inner_steps, 1, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        if not self.adapt:
            raise ConfigError("algo.adapt is empty: name what the inner loop adapts, e.g. ['*']")
        if self.variant == "code" and self.learn_proximal:
            raise ConfigError(
                "algo.learn_proximal: algo.variant=code has a constant λ; choose algo.variant=paper"
            )
        if self.variant == "code" and self.adapt != ["*"]:
            raise ConfigError(
                "algo.variant=code adapts all parameters: leave algo.adapt out, or choose "
                "algo.variant=paper"
            )


@builds(ImamlConfig)
def imaml(problem: Problem, own: ImamlConfig) -> Algorithm:
    """Learn a start θ by the implicit derivative of where the inner steps end.

    In the paper the inner steps minimise L(φ) + λ/2 ‖φ − θ‖² (equation 3), in evaluations as well,
    and the meta-gradient is (I + H/λ)⁻¹ u (lemma 1), with H the Hessian of L at φ and u the
    gradient of the query loss there. λ is `engine.proximal`; `engine.solver_steps` steps of
    conjugate gradients solve the system. Memory does not grow with inner steps.

    With `learn_proximal`, log λ is a meta-parameter that starts at that of `engine.proximal`. The
    derivative by λ is that of the same minimum, by the implicit function theorem: −v·(φ − θ), with
    v = (H + λI)⁻¹ u.

    `variant="code"` is what the reference code computes. The inner steps minimise L(φ) alone, and
    one more step of the inner optimizer minimises λ/2 ‖φ − θ‖². The meta-gradient solves
    (1 + 1) v + Hv / (λ + 10) = u. Evaluations take plain inner steps. Two things of it are
    settings of other groups: Adam with `outer_opt.eps=1e-3`, and `inner_opt.lr=0.1`. Its own way
    to learn λ, "not tested" in its words, is left out, as is the second-order inner solver of the
    paper (Hessian-free), of which it has no code.

    Args:
        problem: model, objective and inner optimizer.
        own: the settings.

    Raises:
        ValueError: another gradient mode, a solver that the variant does not have, or inner
            hyperparameters are to be learned, of which the path is not differentiated.
    """
    inner = problem.inner
    mode = inner.gradient
    if not isinstance(mode, Implicit):
        raise ValueError(
            "algo=imaml differentiates implicitly: leave out engine.gradient, or choose algo=maml"
        )
    loop = MamlConfig(
        inner_steps=own.inner_steps,
        eval_inner_steps=own.eval_inner_steps,
        adapt=own.adapt,
        reduction=own.reduction,
    )
    if own.learn_proximal:
        return descend(problem, loop, _with_proximal(problem, loop, mode), partial(_nearby, mode))
    if own.variant == "paper":
        return maml(problem, loop)
    if mode.solver != "cg":
        raise ValueError(
            f"engine.solver={mode.solver}: algo.variant=code has conjugate gradients alone; leave "
            "it out"
        )
    walk = partial(_pulled_back, mode)
    trained = descend(problem, loop, fast_weights(problem, loop), walk)
    evaluated = maml(problem._replace(inner=inner._replace(gradient="reverse")), loop)
    return trained._replace(trace=evaluated.trace, outputs=evaluated.outputs, adapt=evaluated.adapt)


def _with_proximal(problem: Problem, loop: MamlConfig, mode: Implicit) -> Fast:
    """What is adapted, and log λ beside what all tasks share."""
    fast = fast_weights(problem, loop)
    like = next(problem.model.parameters())

    def decode(params: Meta, encoded: Any) -> Tensor:
        return fast.decode({n: p for n, p in params.items() if n != PROXIMAL}, encoded)

    return fast._replace(
        initial=fast.initial | {PROXIMAL: like.new_tensor(mode.proximal).log().detach()},
        shared=(*fast.shared, PROXIMAL),
        decode=decode,
    )


def _nearby(
    mode: Implicit,
    loss: RecordedLoss,
    start: Params,
    optimizer: InnerOptimizer | LossOptimizer,
    steps: int,
    *,
    context: Any,
    hyper: Callable[[int], Hyper],
    gradient: Any,
    observe: Callable[[Params], Any] | None,
) -> Unrolled:
    """Inner steps on the loss with its proximal term, of which the start and λ are inputs."""

    def proximal(now: Params, given: tuple[Any, Params]) -> Tensor:
        (shared, *_), begun = given
        pull: Tensor = shared[PROXIMAL].exp() / 2 * _distance(now, begun)
        return loss.loss(now, given[0]) + pull

    near = RecordedLoss(proximal, loss.record)
    given = (context, start)
    with torch.no_grad():
        walked = unroll(near, start, optimizer, steps, context=given, hyper=hyper, observe=observe)
    fixed = {name: p.detach() for name, p in start.items()}
    params = attach_implicit(walked.params, fixed, given, near, mode, proximal=0.0)
    return walked._replace(params=params)


def _distance(now: Params, begun: Params) -> Tensor:
    return torch.stack([(now[name] - begun[name]).square().sum() for name in begun]).sum()


def _pulled_back(
    mode: Implicit,
    loss: RecordedLoss,
    start: Params,
    optimizer: InnerOptimizer | LossOptimizer,
    steps: int,
    *,
    context: Any,
    hyper: Callable[[int], Hyper],
    gradient: Any,
    observe: Callable[[Params], Any] | None,
) -> Unrolled:
    """Plain inner steps, one towards the start, and the implicit derivative of the code."""

    def distance(now: Params, step: int, begun: Params) -> Tensor:
        return mode.proximal / 2 * _distance(now, begun)

    with torch.no_grad():
        walked = unroll(loss, start, optimizer, steps, context=context, hyper=hyper)
        back = unroll(
            distance,
            walked.params,
            optimizer,
            1,
            context=start,
            hyper=hyper(steps - 1),
            state=walked.state,
        )
    # (1 + d) v + Hv / (λ + 10) = u has the solution (λ + 10) (H + p)⁻¹ u with
    # p = (1 + d) (λ + 10), and the derivative below is p (H + p)⁻¹ u: (1 + d) times that.
    scaled = {n: p.detach() + (p - p.detach()) / (1 + CG_DAMPING) for n, p in start.items()}
    damped = (1 + CG_DAMPING) * (mode.proximal + LAMBDA_DAMPING)
    implicit = Implicit(damped, "cg", mode.solver_steps)
    params = attach_implicit(back.params, scaled, context, loss, implicit)
    return Unrolled(params, back.state, walked.losses, [])
