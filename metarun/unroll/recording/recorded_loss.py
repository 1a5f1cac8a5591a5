"""Inner losses whose gradient is recorded once for all inner steps, as is its derivative.

A recording of a whole unroll grows with its steps; that of one step serves them all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from metarun.unroll._torch import pytree
from metarun.unroll.corrected.right_derivatives import right_to_order
from metarun.unroll.gradients.inner import ContextLoss, inner_gradient, loss_gradient, one_number
from metarun.unroll.gradients.recompute import (
    Flat,
    by_reverse,
    plain_autograd_will_do,
    recomputed,
    tensor_leaves,
)
from metarun.unroll.optim.base import Params
from metarun.unroll.recording.recorded import Record


class RecordedLoss:
    """An inner loss that is the same at every step.

    It can be given to `unroll` as any loss. In "checkpoint" with blocks of one step, the gradient
    of the loss and the pullback of that gradient are then programs that `record` makes of them,
    one for each layout of their arguments. Under transforms of `torch.func`, for derivatives
    beyond the second and where there is no graph, they run as they are.

    Args:
        loss: `loss(params, context)`, a scalar, of tensors alone.
        record: see `metarun.unroll.recording.recorded`.

    Example:
        >>> import torch
        >>> from metarun.unroll import RecordedLoss, recorded, sgd, unroll
        >>> loss = RecordedLoss(lambda p, target: (p["w"] - target).square().sum(), recorded)
        >>> w, target = torch.zeros(1, requires_grad=True), torch.tensor([3.0])
        >>> for steps in (2, 9):  # the programs serve both lengths
        ...     end = unroll(loss, {"w": w}, sgd(0.1), steps, context=target, gradient="checkpoint")
        ...     torch.autograd.grad(loss(end.params, target), w)
        (tensor([-2.4576]),)
        (tensor([-0.1081]),)
    """

    def __init__(self, loss: ContextLoss, record: Record) -> None:
        self.loss, self.record = right_to_order(2, loss), record
        self._gradient = record(partial(loss_gradient, self))
        self._pullbacks: dict[tuple[int, ...], Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, params: Params, context: Any) -> Tensor:
        """The loss itself."""
        return one_number(self.loss, params, context)

    def gradient(self, params: Params, context: Any) -> tuple[Params, Tensor]:
        """`inner_gradient` that remembers its arguments alone."""
        leaves, structure = pytree.tree_flatten((params, context))
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return inner_gradient(self, params, context, "checkpoint")

        def gradient(given: tuple[Params, Any]) -> tuple[Params, Tensor]:
            plain = plain_autograd_will_do(tensor_leaves(given))
            found: tuple[Params, Tensor]
            found = self._gradient(*given) if plain else loss_gradient(self, *given)
            return found

        def pullback(
            fn: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[int]
        ) -> Sequence[Tensor]:
            if not plain_autograd_will_do([*inputs, *cotangents]):
                return by_reverse(fn, inputs, cotangents, wanted)
            chosen = tuple(wanted)
            if chosen not in self._pullbacks:
                self._pullbacks[chosen] = self.record(partial(_pulled_back, self, chosen))
            given = pytree.tree_unflatten(list(inputs), structure)
            return self._pullbacks[chosen](*given, list(cotangents))

        found: tuple[Params, Tensor] = recomputed(gradient, (params, context), pullback)
        return found


def _pulled_back(
    loss: ContextLoss, wanted: tuple[int, ...], params: Params, context: Any, slopes: list[Tensor]
) -> list[Tensor]:
    """The pullback of `loss_gradient`, of pytrees."""
    inputs, structure = pytree.tree_flatten((params, context))

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = pytree.tree_unflatten(list(tensors), structure)
        return tuple(pytree.tree_leaves(loss_gradient(loss, *given)))

    return list(by_reverse(flat, inputs, slopes, wanted))
