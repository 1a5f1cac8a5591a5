"""The differentiable unroll: inner adaptation as one function of its starting point."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metarun.unroll.optim.base import Hyper, InnerOptimizer, Params, State

GradientMode = Literal["reverse", "first_order"]
LossFn = Callable[[Params, int], Tensor]


class Unrolled(NamedTuple):
    """Where an unroll ended.

    Attributes:
        params: the fast weights after the last step.
        state: the optimizer's state after the last step.
        losses: (steps,) the inner loss before each step.
        observed: what `observe` returned, for the start and after each step (steps + 1 items,
            or none without `observe`).
    """

    params: Params
    state: State
    losses: Tensor
    observed: list[Any]


def unroll(
    loss_fn: LossFn,
    params: Params,
    optimizer: InnerOptimizer,
    steps: int,
    *,
    hyper: Hyper | Callable[[int], Hyper] | None = None,
    state: State | None = None,
    gradient: GradientMode = "reverse",
    observe: Callable[[Params], Any] | None = None,
) -> Unrolled:
    """Take `steps` optimizer steps on `loss_fn`, differentiably.

    The result is a function of `params`, `state`, the tensors in `hyper` and whatever
    `loss_fn` closes over, and can be differentiated by `torch.autograd` or `torch.func`,
    inside or outside `torch.func.vmap`. Nothing is changed in place. Under `torch.no_grad()`
    no graph is kept, and memory does not grow with the number of steps.

    Args:
        loss_fn: `loss_fn(params, step)` gives the scalar inner loss of step 0, 1, ….
        params: the initial fast weights; only these are adapted.
        optimizer: see `metarun.unroll.optim`.
        steps: number of inner steps, 0 or more.
        hyper: hyperparameters, or a function of the step that gives them (learned values a
            step, schedules); the optimizer's own defaults if absent.
        state: the optimizer state to go on from; a fresh one if absent.
        gradient: "reverse" keeps every derivative (second-order MAML: Finn et al. 2017, eq. 1).
            "first_order" treats the inner gradients as constants (FOMAML: section 5.2 there);
            derivatives still flow through the initial params and the hyperparameters, and no
            graph is built for the inner loss.
        observe: called on the fast weights at the start and after each step.

    Raises:
        ValueError: an unknown gradient mode, or a negative number of steps.
    """
    if gradient not in get_args(GradientMode):
        allowed = ", ".join(get_args(GradientMode))
        raise ValueError(f"unknown gradient mode {gradient!r}: choose one of {allowed}")
    if steps < 0:
        raise ValueError(f"the number of inner steps must be 0 or more, not {steps}")
    if state is None:
        state = optimizer.init(params)
    constant_hyper = optimizer.hyper if hyper is None else hyper
    hyper_at = constant_hyper if callable(constant_hyper) else lambda _: constant_hyper

    losses: list[Tensor] = []
    observed = [] if observe is None else [observe(params)]
    for step in range(steps):
        with _inner_graph(gradient):
            grads, loss = torch.func.grad_and_value(loss_fn)(params, step)
        params, state = optimizer.update(grads, state, params, hyper_at(step))
        losses.append(loss)
        if observe is not None:
            observed.append(observe(params))
    if not losses:  # of the parameters' device and type, like losses would be
        losses_of_steps = next(iter(params.values()), torch.empty(0)).new_empty(0)
        return Unrolled(params, state, losses_of_steps, observed)
    return Unrolled(params, state, torch.stack(losses), observed)


def _inner_graph(gradient: GradientMode) -> AbstractContextManager[Any]:
    # `torch.func.grad` differentiates within its own level whatever surrounds it; no_grad
    # outside it only keeps the *outer* level from recording, which is first order exactly.
    return torch.no_grad() if gradient == "first_order" else nullcontext()
