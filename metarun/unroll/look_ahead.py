"""Meta-learning online: look a few inner steps ahead, learn, then take the real steps."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.unroll._torch import pytree
from metarun.unroll.engine import unroll
from metarun.unroll.gradients.modes import GradientMode
from metarun.unroll.optim.base import Hyper, InnerOptimizer, LossOptimizer, Params, State
from metarun.unroll.tasks import Meta


class LookAhead(NamedTuple):
    """The inner problem between two meta-updates; see `look_ahead`, whose example reads one.

    Attributes:
        params: the real parameters, detached.
        state: the real optimizer's state, detached.
        loss: () the inner loss before the last of the real steps.
        meta_loss: () the meta-loss at the end of the look-ahead.
    """

    params: Params
    state: State
    loss: Tensor
    meta_loss: Tensor


def look_ahead(
    loss_fn: Callable[[Params, int, Meta], Tensor],
    params: Params,
    optimizer: InnerOptimizer | LossOptimizer,
    meta: dict[str, Tensor],
    meta_loss: Callable[[Params, Meta], Tensor],
    meta_optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    ahead: int = 1,
    real: int = 1,
    hyper: Callable[[Meta], Hyper] | None = None,
    state: State | None = None,
    gradient: GradientMode = "reverse",
) -> Iterator[LookAhead]:
    """Train one model while learning how to train it, with a persistent inner state.

    Each meta-update unrolls `ahead` steps from a copy of the real parameters and optimizer
    state, differentiates `meta_loss` at their end with respect to the meta-parameters, lets
    `meta_optimizer` update these in place, and then takes `real` steps from where the model
    really is, with the new meta-parameters (compare the general loop of Grefenstette et al. 2019).
    No graph survives an update, so memory is that of `ahead` steps however long the training is.

    Args:
        loss_fn: `loss_fn(params, step, meta)`; `step` counts the real steps, so that a step of
            the look-ahead sees the number, and hence the data, that the real one will see.
        params: where the model starts.
        optimizer: the inner optimizer.
        meta: leaf tensors that `meta_optimizer` updates. They may enter the loss (a learned
            loss, example weights) or the optimizer, through `hyper`.
        meta_loss: `meta_loss(params, meta)` after the look-ahead.
        meta_optimizer: any torch optimizer over the tensors of `meta`.
        updates: number of meta-updates.
        ahead: inner steps that each looks ahead, 1 or more.
        real: inner steps taken for good after each, 1 or more.
        hyper: `hyper(meta)`, the inner hyperparameters; the optimizer's own if absent.
        state: the inner optimizer's state to go on from; a fresh one if absent.
        gradient: as of `unroll`.

    Yields:
        The state of the inner problem after each meta-update and its real steps.

    Raises:
        ValueError: `ahead` or `real` below 1, a meta-loss that does not depend on `meta`, or what
            `unroll` raises.

    Example:
        >>> import torch
        >>> from metarun.unroll import look_ahead, sgd
        >>> meta = {"lr": torch.tensor(0.01, requires_grad=True)}
        >>> rounds = look_ahead(
        ...     lambda params, step, meta: (params["w"] - 3).square().sum(),
        ...     {"w": torch.zeros(1)},
        ...     sgd(),
        ...     meta,
        ...     meta_loss=lambda params, meta: (params["w"] - 3).square().sum(),
        ...     meta_optimizer=torch.optim.Adam(meta.values(), lr=0.05),
        ...     updates=5,
        ...     hyper=lambda meta: {**sgd().hyper, "lr": meta["lr"]},
        ... )
        >>> for now in rounds:
        ...     print(f"{now.loss:.3f}")
        9.000
        6.970
        4.268
        2.041
        0.760
        >>> meta["lr"] > 0.1
        tensor(True)

    References:
        Grefenstette et al. 2019, Generalized inner loop meta-learning.
    """
    if ahead < 1 or real < 1:
        raise ValueError(f"look_ahead needs 1 step or more, not ahead={ahead}, real={real}")
    hyper_of = hyper or (lambda _: optimizer.hyper)
    params = _detached(params)
    state = _detached(optimizer.init(params) if state is None else state)

    def steps_from(done: int, steps: int, mode: GradientMode) -> Any:
        return unroll(
            lambda p, step, given: loss_fn(p, done + step, given),
            params,
            optimizer,
            steps,
            context=meta,
            hyper=hyper_of(meta),
            state=state,
            gradient=mode,
        )

    for update in range(updates):
        looked = steps_from(update * real, ahead, gradient)
        outer = meta_loss(looked.params, meta)
        if not (isinstance(outer, Tensor) and outer.requires_grad):
            raise ValueError(
                "the meta-loss does not depend on what is learned, as far as derivatives can see: "
                "meta enters neither the loss, nor the optimizer through hyper=, nor meta_loss"
            )
        grads = torch.autograd.grad(outer, list(meta.values()), materialize_grads=True)
        for value, grad in zip(meta.values(), grads, strict=True):
            value.grad = grad
        meta_optimizer.step()
        with torch.no_grad():
            walked = steps_from(update * real, real, "reverse")
        params, state = _detached(walked.params), _detached(walked.state)
        yield LookAhead(params, state, walked.losses[-1], outer.detach())


def _detached(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)
