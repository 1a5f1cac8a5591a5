"""The inner steps of an unroll: what stays the same from one to the next, and one step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.unroll.advice import explained
from metarun.unroll.corrected.right_derivatives import right_to_order, within_another
from metarun.unroll.effects.surroundings import tracked
from metarun.unroll.gradients.blocks import BlockLoss, blockwise_gradient
from metarun.unroll.gradients.derivatives import derivatives_of
from metarun.unroll.gradients.inner import (
    ContextLoss,
    Remember,
    dependent,
    inner_gradient,
    one_number,
)
from metarun.unroll.gradients.modes import Implicit, Parsed
from metarun.unroll.gradients.proof import check_differentiable, check_unwritten, versions_of
from metarun.unroll.inputs import check_hyper, check_signature
from metarun.unroll.optim.base import Hyper, InnerOptimizer, LossOptimizer, Params, State
from metarun.unroll.recording.recorded_loss import RecordedLoss

LossFn = Callable[..., Tensor] | BlockLoss | RecordedLoss


class Unrolled(NamedTuple):
    """Where an unroll ended.

    Attributes:
        params: the fast weights after the last step.
        state: the optimizer's state after the last step.
        losses: (steps,) the inner loss before each step; constants in "first_order" and
            "implicit", and before the last steps of `Truncated`.
        observed: what `observe` returned, for the start and after each step (steps + 1 items,
            or none without `observe`).
    """

    params: Params
    state: State
    losses: Tensor
    observed: list[Any]


class Path(NamedTuple):
    """What stays the same from step to step."""

    loss_at: Callable[[int], ContextLoss]
    optimizer: InnerOptimizer | LossOptimizer
    context: Any
    hyper_at: Callable[[int], Hyper]
    observe: Callable[[Params], Any] | None
    loss_fn: Any  # what the user wrote of the loss
    order: int  # of the inner loss's derivatives that are taken

    def walk(self, params: Params, state: State, steps: range, remember: Remember) -> Unrolled:
        """The steps with these numbers."""
        losses: list[Tensor] = []
        observed = [] if self.observe is None else [self.observe(params)]
        for step in steps:
            before = params, state
            versions = [] if losses else versions_of(params)
            params, state, loss = self.take(params, state, step, remember)
            check_unwritten(before[0], versions)
            if remember == "reverse" and not losses and torch.is_grad_enabled():
                inputs = (*before, self.context, self.hyper_at(step))
                check_differentiable(params, inputs, self.loss_fn, params)
            losses.append(loss)
            if self.observe is not None:
                observed.append(self.observe(params))
        if not losses:  # of the parameters' device and type, like losses would be
            return Unrolled(params, state, next(iter(params.values())).new_empty(0), observed)
        return Unrolled(params, state, torch.stack(losses), observed)

    def take(
        self, params: Params, state: State, step: int, remember: Remember
    ) -> tuple[Params, State, Tensor]:
        """One step: the new parameters and state, and the loss before it."""
        loss = self.loss_at(step)
        hyper = self.hyper_at(step)
        check_hyper(hyper, self.optimizer)
        if isinstance(self.optimizer, LossOptimizer):
            return self._take_loss_driven(loss, params, state, hyper, remember)
        with explained():
            if remember == "mixed" and isinstance(loss, BlockLoss):
                grads, value = blockwise_gradient(loss, params, self.context)
            elif remember == "checkpoint" and isinstance(loss, RecordedLoss) and not tracked():
                grads, value = loss.gradient(params, self.context)
            else:
                grads, value = inner_gradient(loss, params, self.context, remember)
        moved, state = self.optimizer.update(grads, state, params, hyper)
        for name, p in params.items():
            if moved[name].shape != p.shape:
                raise ValueError(
                    f"the step would turn {name} from shape {tuple(p.shape)} into "
                    f"{tuple(moved[name].shape)}: hyperparameters must broadcast to parameters"
                )
        return moved, state, value

    def _take_loss_driven(
        self, loss: ContextLoss, params: Params, state: State, hyper: Hyper, remember: Remember
    ) -> tuple[Params, State, Tensor]:
        assert isinstance(self.optimizer, LossOptimizer)
        if remember == "mixed":
            raise ValueError(
                "gradient='mixed' needs an inner optimizer that is driven by the gradient "
                "alone: choose gradient='checkpoint'"
            )
        with explained():
            derivatives = derivatives_of(
                right_to_order(self.order, lambda p: dependent(loss)(p, self.context)),
                params,
                constant=remember == "first_order",
            )
            params, state = self.optimizer.update(derivatives, state, params, hyper)
        return params, state, derivatives.loss


def derivative_order(mode: Parsed, optimizer: InnerOptimizer | LossOptimizer) -> int:
    """How often the inner loss is differentiated, the outer derivative included."""
    if isinstance(optimizer, LossOptimizer):
        return 3  # constant Hessians too: vmap, which makes them, has wrong ones of distances
    if mode == "first_order" or not (torch.is_grad_enabled() or isinstance(mode, Implicit)):
        return 1
    # Within the loss of another unroll, that one's derivative is to come as well.
    return 2 + within_another()


def losses_by_step(loss_fn: LossFn, has_context: bool, order: int) -> Callable[[int], ContextLoss]:
    """The loss of each step as a function of params and context that must give a scalar."""
    if isinstance(loss_fn, BlockLoss | RecordedLoss):
        return lambda _: loss_fn
    right_fn = right_to_order(order, loss_fn)

    def loss_at(step: int) -> ContextLoss:
        def loss(params: Params, context: Any) -> Tensor:
            try:
                return one_number(right_fn, params, step, *((context,) if has_context else ()))
            except TypeError:
                check_signature(loss_fn, has_context)  # the better reason, where there is one
                raise

        return loss

    return loss_at


def evaluated(path: Path, step: int, given: Any) -> Any:
    """What a step computes apart from derivatives, for `check_closure`."""
    params, state, context, hyper = given
    value = path.loss_at(step)(params, context)
    if isinstance(path.optimizer, InnerOptimizer):
        return value, path.optimizer.update(params, state, params, hyper)  # any gradient will do
    return value


def unwrapped(loss_fn: LossFn) -> Any:
    """A loss without what this package puts around it."""
    return loss_fn.loss if isinstance(loss_fn, RecordedLoss) else loss_fn
