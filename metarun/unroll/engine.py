"""The differentiable unroll: inner adaptation as one function of its starting point."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metarun.unroll.advice import explained
from metarun.unroll.effects.surroundings import Place, tracking
from metarun.unroll.gradients.closure import check_closure
from metarun.unroll.gradients.evolution import by_evolution, draw_seed
from metarun.unroll.gradients.forward_mode import detached
from metarun.unroll.gradients.implicit import attach_implicit
from metarun.unroll.gradients.inner import (
    ContextLoss,
    dependent,
)
from metarun.unroll.gradients.mixed_check import checked_mixed
from metarun.unroll.gradients.modes import (
    Checkpoint,
    Evolution,
    GradientMode,
    Implicit,
    Parsed,
    Truncated,
    parse_gradient,
)
from metarun.unroll.gradients.recompute import (
    Pullback,
    by_reverse,
    distinct,
    recomputed,
    tensor_leaves,
)
from metarun.unroll.inputs import (
    check_gradients_possible,
    check_hyper,
    check_real,
    checked_params,
    checked_state,
    checked_steps,
)
from metarun.unroll.optim.base import Hyper, InnerOptimizer, LossOptimizer, Params, State
from metarun.unroll.optim.check import check_optimizer
from metarun.unroll.path import (
    LossFn,
    Path,
    Unrolled,
    derivative_order,
    evaluated,
    losses_by_step,
    unwrapped,
)


def unroll(
    loss_fn: LossFn,
    params: Params,
    optimizer: InnerOptimizer | LossOptimizer,
    steps: int,
    *,
    context: Any = None,
    hyper: Hyper | Callable[[int], Hyper] | None = None,
    state: State | None = None,
    gradient: GradientMode = "reverse",
    observe: Callable[[Params], Any] | None = None,
) -> Unrolled:
    """Take `steps` optimizer steps on `loss_fn`, differentiably.

    Nothing is changed in place. Under `torch.no_grad()` no graph is kept, and memory does not grow
    with the number of steps.

    Gradient modes:

    - "reverse" keeps the graph of every step (second-order MAML: Finn et al. 2017, eq. 1).
    - "first_order" takes the inner gradients as constants (FOMAML: section 5.2 there);
      derivatives still flow through the initial params and the hyperparameters.
    - "checkpoint" or `Checkpoint(block)`: exact; recomputes instead of remembering.
    - "mixed": exact; remembers the fast weights only; differentiates the inner gradient in forward
      mode (MixFlow-MG, Kemaev et al. 2025). Where that fails, warns and uses "checkpoint".
    - `Truncated(last)`: exact through the last steps, first-order weights before them.
    - "implicit" or `Implicit(…)`: by the implicit function theorem, of a proximal inner loss.
    - "evolution" or `Evolution(…)`: an estimate by evolution strategies.

    Args:
        loss_fn: `loss_fn(params, step)`, or `loss_fn(params, step, context)` if there is a
            context, gives the scalar inner loss of step 0, 1, …. Or a `BlockLoss`, `RecordedLoss`.
        params: the initial fast weights; only these are adapted.
        optimizer: see `metarun.unroll.optim`. In "first_order" its Hessians are constants too.
        steps: number of inner steps, 0 or more.
        context: a pytree with whatever else the loss depends on: meta-parameters, data. Modes
            other than "reverse", "first_order" and truncated ones see the tensors given here
            only, and refuse a loss that closes over others that need gradients or are mapped.
        hyper: hyperparameters, or a function of the step that gives them; else the optimizer's own.
        state: the optimizer state to go on from; a fresh one if absent.
        gradient: one of the modes above.
        observe: called on the fast weights at the start and after each step.

    Returns:
        Where it ended, to be differentiated with respect to `params`, `state` and the tensors in
        `hyper` and `context` by `torch.autograd` or `torch.func`, within `torch.func.vmap` or not.

    Raises:
        ValueError: an argument of another kind, an unknown mode or name in `hyper`, a loss that is
            no scalar, does not depend on the parameters or closes over what loses its gradient;
            hyperparameters to differentiate in "implicit"; `observe` where a mode skips steps.

    Example:
        >>> import torch
        >>> from metarun.unroll import sgd, unroll
        >>> w = torch.zeros(1, requires_grad=True)
        >>> end = unroll(lambda p, step: (p["w"] - 3).square().sum(), {"w": w}, sgd(0.1), steps=2)
        >>> torch.autograd.grad(end.params["w"].sum(), w)  # (1 − 2 lr)²
        (tensor([0.6400]),)
    """
    mode = parse_gradient(gradient)
    check_gradients_possible()
    check_optimizer(optimizer)
    steps, params = checked_steps(steps), checked_params(params)
    if not params:
        raise ValueError("there are no parameters to adapt: params is empty")
    order = derivative_order(mode, optimizer)
    loss_at = losses_by_step(loss_fn, context is not None, order)
    state = checked_state(state, optimizer.init(params))
    constant_hyper = optimizer.hyper if hyper is None else hyper
    hyper_at = constant_hyper if callable(constant_hyper) else lambda _: constant_hyper
    path = Path(loss_at, optimizer, context, hyper_at, observe, unwrapped(loss_fn), order)
    if steps == 0 or (not isinstance(mode, Implicit) and not torch.is_grad_enabled()):
        mode = "reverse"  # there is nothing to remember, and nothing to recompute
    if isinstance(mode, Implicit | Evolution):
        check_real((params, state, context))
    places: list[Place] = []
    if mode == "mixed" or isinstance(mode, Checkpoint | Implicit | Evolution):
        for step in sorted({0, steps - 1}) if steps else ():
            check_hyper(at_step := hyper_at(step), optimizer)
            given = (params, state, context, at_step)
            with explained():
                seen = check_closure(partial(evaluated, path, step), given, path.loss_fn)
            places += seen.places
            if mode == "mixed" and isinstance(optimizer, InnerOptimizer):
                with tracking(places):
                    mode = checked_mixed(loss_fn, path.loss_at(step), params, context, seen.called)
    with tracking(places):
        return _unrolled(path, params, state, steps, mode)


def _unrolled(path: Path, params: Params, state: State, steps: int, mode: Parsed) -> Unrolled:
    if isinstance(mode, Truncated):
        return _truncated(path, params, state, steps, mode.last)
    if isinstance(mode, Implicit):
        return _implicit(path, params, state, steps, mode)
    if isinstance(mode, Evolution):
        return _in_blocks(path, params, state, [range(steps)], by_evolution(mode, draw_seed()))
    if isinstance(mode, Checkpoint):
        size = mode.size(steps)
        if size > 1 or isinstance(path.optimizer, LossOptimizer):
            blocks = [range(a, min(a + size, steps)) for a in range(0, steps, size)]
            return _in_blocks(path, params, state, blocks, by_reverse)
        return path.walk(params, state, range(steps), "checkpoint")
    return path.walk(params, state, range(steps), mode)


def _truncated(path: Path, start: Params, state: State, steps: int, last: int) -> Unrolled:
    cut = max(steps - last, 0)
    with torch.no_grad():
        early = path.walk(start, state, range(cut), "reverse")
    params = {name: _straight_through(start[name], early.params[name]) for name in start}
    state = detached(early.state) if cut else state
    late = path.walk(params if cut else start, state, range(cut, steps), "reverse")
    losses = torch.cat([early.losses, late.losses])
    return late._replace(losses=losses, observed=early.observed[:-1] + late.observed)


def _in_blocks(
    path: Path, params: Params, state: State, blocks: Iterable[range], pullback: Pullback
) -> Unrolled:
    """Each block of steps as one recomputed function of everything that it depends on."""
    if path.observe is not None:
        raise ValueError("observe sees each step, which this gradient mode only recomputes")
    losses = [next(iter(params.values())).new_empty(0)]
    for steps in blocks:
        # A value that serves several steps is one input: one derivative, one perturbation.
        hypers, hypers_from = distinct({step: path.hyper_at(step) for step in steps})
        block = partial(_block, path, steps, hypers_from)
        given = (params, state, hypers, path.context)
        params, state, block_losses = recomputed(block, given, pullback)
        losses.append(block_losses)
    return Unrolled(params, state, torch.cat(losses), [])


def _block(
    path: Path, steps: range, hypers_from: Callable[[list[Tensor]], Any], given: Any
) -> tuple[Params, State, Tensor]:
    params, state, hypers, context = given
    inside = path._replace(context=context, hyper_at=hypers_from(hypers).__getitem__)
    return inside.walk(params, state, steps, "reverse")[:3]


def _implicit(path: Path, start: Params, state: State, steps: int, mode: Implicit) -> Unrolled:
    """Plain steps on the proximal loss, then the implicit derivative at their end."""

    def proximal_at(step: int) -> ContextLoss:
        def proximal(params: Params, context: Any) -> Tensor:
            distance = sum((params[name] - start[name]).pow(2).sum() for name in start)
            return dependent(path.loss_at(step))(params, context) + mode.proximal / 2 * distance

        return proximal

    hypers = [path.hyper_at(step) for step in range(steps)]
    if any(h.requires_grad for h in tensor_leaves(hypers)):
        raise ValueError(
            "gradient='implicit' has no derivative with respect to the inner optimizer's "
            "hyperparameters: do not learn them, or choose another gradient mode"
        )
    with torch.no_grad():
        walked = path._replace(loss_at=proximal_at).walk(start, state, range(steps), "reverse")
    last = max(steps - 1, 0)
    params = attach_implicit(walked.params, start, path.context, path.loss_at(last), mode)
    return walked._replace(params=params)


def _straight_through(start: Tensor, end: Tensor) -> Tensor:
    """The value of `end` with the derivative of `start`."""
    return end.detach() + (start - start.detach())
