"""Inner steps that nothing is differentiated through: a task is fitted, and no more."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metarun.components.algo.adapting import Adapted, Predictor, Watch
from metarun.components.algo.inner_loop import Prepared
from metarun.unroll import Meta, Params, unroll


def fitted(
    loop: Prepared,
    meta: Meta,
    start: Params,
    loss: Callable[[Params, int, Any], Tensor],
    context: Any,
    predictor: Callable[[Params], Predictor],
    steps: int,
    watch: Watch | None,
) -> Adapted:
    """What comes of inner steps from `start`.

    Args:
        loop: the inner optimizer.
        meta: the meta-parameters, of which the optimizer's hyperparameters are.
        start: what is fitted, by name.
        loss: `loss(fast, step, context)`, scalar.
        context: tensors that the loss needs.
        predictor: makes a predictor of what has been fitted.
        steps: how many are taken.
        watch: see `Adapted`.
    """
    end = unroll(
        loss,
        start,
        loop.optimizer,
        steps,
        context=context,
        hyper=loop.hyper(meta),
        gradient="first_order",
        observe=None if watch is None else lambda fast: watch(predictor(fast)),
    )
    return Adapted(predictor(end.params), end.losses, end.observed)
