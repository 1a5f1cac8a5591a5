"""Mixed mode checks itself: one product in forward mode against the same in reverse mode.

A wrong rule for a tangent, in torch or in a custom function, gives a wrong meta-gradient without
a word. So does a hook that changes gradients, of which mixed mode assumes that they are gradients.
And dropout may draw another mask, although from the same random state: masks follow the order of
a tensor's elements in memory, and after an attention layer that order differs. So the product of a
random vector is computed in both modes, once for each program: the operations that a loss calls,
on tensors of given shapes.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.unroll._torch import (
    disable_current_modes,
    maybe_current_level,
    pytree,
    temporarily_clear_interpreter_stack,
)
from metarun.unroll.gradients.blocks import BlockLoss, block_gradient, by_blocks
from metarun.unroll.gradients.closure import plain_values
from metarun.unroll.gradients.inner import (
    ContextLoss,
    forward_over_reverse,
    load_forward_rules,
    loss_gradient,
)
from metarun.unroll.gradients.modes import Checkpoint
from metarun.unroll.gradients.recompute import RandomState, by_reverse, flattened, tensor_leaves
from metarun.unroll.optim.base import Params

MOST = 1000  # programs that are remembered
_agreed: OrderedDict[Any, bool] = OrderedDict()


def checked_mixed(
    loss_fn: Any, loss: ContextLoss, params: Params, context: Any, called: Sequence[Any]
) -> Literal["mixed"] | Checkpoint:
    """The gradient mode: mixed, or, with a warning, checkpoint where mixed would be wrong.

    Args:
        loss_fn: what `unroll` was given, whose code is a part of what a program is.
        loss: the inner loss made of it.
        params, context: its arguments.
        called: the functions of torch that a step with it calls.
    """
    # What surrounds the unroll does not matter here, transforms or a recording under way; but
    # where there are transforms, the pullback uses them, and does so where gradients are enabled.
    mapped = maybe_current_level() is not None
    with temporarily_clear_interpreter_stack(), disable_current_modes():
        with torch.no_grad():
            given = plain_values((params, context))
        layouts = tuple((x.shape, x.dtype, x.device) for x in tensor_leaves(given))
        key = (mapped, getattr(loss_fn, "__code__", type(loss_fn)), tuple(called), layouts)
        if key not in _agreed:
            while len(_agreed) >= MOST:
                _agreed.popitem(last=False)
            with torch.set_grad_enabled(mapped):
                _agreed[key] = _agrees(loss, given)
    if _agreed[key]:
        return "mixed"
    warnings.warn(
        "gradient='mixed' falls back to 'checkpoint': forward mode and reverse mode differ for "
        "this inner loss. Something in it has a wrong rule for one of them, such as a custom "
        "autograd.Function or a hook that changes gradients, or has dropout whose mask depends on "
        "how a tensor lies in memory. The result is that of reverse mode; choose "
        "gradient='checkpoint' to begin with",
        stacklevel=3,
    )
    return Checkpoint()


def _agrees(loss: ContextLoss, given: tuple[Params, Any]) -> bool:
    """Whether the two pullbacks agree. Whoever computes the derivative meets their errors."""
    load_forward_rules()
    if isinstance(loss, BlockLoss):
        gradient: Any = partial(block_gradient, loss)
        pullback = by_blocks(loss, *given)
    else:
        gradient, pullback = partial(loss_gradient, loss), forward_over_reverse(loss, given)
    of_tensors = flattened(lambda both: gradient(*both), given)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(of_tensors(*tensors)))

    leaves = tensor_leaves(given)
    wanted = [i for i, x in enumerate(leaves) if x.is_floating_point()]
    random_state = RandomState(leaves)
    products: list[Sequence[Tensor]] = []
    try:
        with random_state.restored(), random_state.seeded(0):
            along = [torch.randn_like(x) for x in flat(*leaves)]
        for pull in (pullback, by_reverse):
            with random_state.restored():
                products.append(pull(flat, leaves, along, wanted))
    except Exception:
        return True
    with torch.no_grad():
        return _equal(*products)


def _equal(ours: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are the same but for rounding, NaN where the other is NaN."""
    whole = sum(float(b.double().square().sum()) for b in right) ** 0.5
    for a, b in zip(ours, right, strict=True):
        tolerance = 30 * torch.finfo(b.dtype).eps ** 0.5
        size = float(b.double().norm()) + 1e-3 * whole
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        if whole < float("inf") and not float((a - b).double().norm()) <= tolerance * size:
            return False
    return True
