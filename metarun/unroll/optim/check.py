"""What is no inner optimizer, refused with what to use in its place."""

from typing import Any

import torch

from metarun.unroll.advice import describe
from metarun.unroll.optim.base import InnerOptimizer, LossOptimizer


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no inner optimizer.

    Raises:
        ValueError: it says what to use in its place.
    """
    if isinstance(optimizer, InnerOptimizer | LossOptimizer):
        return
    if isinstance(optimizer, torch.optim.Optimizer):
        advice = "from_torch(optimizer, model), which gives an optimizer and its state, goes on "
        advice += "from where it stands"
    elif isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        advice = f"use metarun.unroll's own: {optimizer.__name__.lower()}(lr=0.1), say"
    elif callable(optimizer):
        advice = f"call it first: {getattr(optimizer, '__name__', 'optimizer')}(…)"
    elif isinstance(getattr(optimizer, "optimizer", None), InnerOptimizer | LossOptimizer):
        advice = "use its attribute `optimizer` (and unroll(…, state=…) for its state)"
    else:
        advice = "use one of metarun.unroll: sgd(lr=0.1), adam(lr=0.01), newton() …"
    raise ValueError(f"optimizer is {describe(optimizer)}, not an inner optimizer: {advice}")
