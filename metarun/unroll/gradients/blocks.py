"""Inner losses of networks that are a list of blocks, differentiated a block at a time.

Mixed mode as such spares the graphs of all inner steps but one. In a deep network that one is
what counts; here it, too, shrinks to the inputs of the blocks and the inside of one block
(after Kemaev et al. 2025, arXiv 2505.00793).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarun.unroll.corrected.right_derivatives import RightDerivatives, right_to_order
from metarun.unroll.gradients.forward_mode import jvp
from metarun.unroll.gradients.inner import or_by_reverse, scalar
from metarun.unroll.gradients.recompute import (
    Pullback,
    RandomState,
    flattened,
    recomputed,
    restrict_to,
)
from metarun.unroll.optim.base import Params

Vector = Sequence[Tensor]


class _Block(NamedTuple):
    module: nn.Module
    names: dict[str, str]  # the module's own parameter name -> its name in the whole network

    def of(self, params: Params) -> Params:
        """Those of all parameters that this block has, by its own names."""
        return {own: params[name] for own, name in self.names.items() if name in params}

    def __call__(self, own: Params, x: Tensor) -> Tensor:
        others = {n: p.detach() for n, p in self.module.named_parameters() if n not in own}
        # The other attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), RightDerivatives(2):
            outputs: Tensor = torch.func.functional_call(self.module, {**others, **own}, (x,))
        return outputs


class BlockLoss:
    """An inner loss `loss(model(inputs))` of a model that is a list of blocks.

    It can be given to `unroll` as any loss; `gradient="mixed"` then works a block at a time.
    The parameters of the blocks come from `params` only (names as in
    `model.named_parameters()`; one that is missing there keeps its value, as a constant);
    the context enters by `inputs` and `loss`.

    Args:
        model: its children are the blocks, each from one tensor to one tensor. Parameters may be
            shared between them.
        inputs: `inputs(context)`, what goes into the first block.
        loss: `loss(outputs, context)`, a scalar.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from metarun.unroll import BlockLoss, sgd, unroll
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        >>> loss = BlockLoss(model, lambda task: task, lambda y, task: (y - task).square().mean())
        >>> params, task = dict(model.named_parameters()), torch.randn(5, 4)
        >>> end = unroll(loss, params, sgd(0.1), 3, context=task, gradient="mixed")
        >>> loss(end.params, task) < loss(params, task)
        tensor(True)

    References:
        Kemaev et al. 2025, Scalable meta-learning via mixed-mode differentiation
        (arXiv 2505.00793).
    """

    def __init__(
        self,
        model: nn.Sequential,
        inputs: Callable[[Any], Tensor],
        loss: Callable[[Tensor, Any], Tensor],
    ) -> None:
        name_of = {id(p): name for name, p in model.named_parameters()}
        self.blocks = [
            _Block(block, {own: name_of[id(p)] for own, p in block.named_parameters()})
            for block in model
        ]
        self.inputs = right_to_order(2, inputs)
        self.loss = right_to_order(2, loss)

    def __call__(self, params: Params, context: Any) -> Tensor:
        """The loss as one function, the same for each step.

        Args:
            params: the parameters, by their names in the whole model.
            context: what `inputs` and `loss` are given.

        Returns:
            The loss, ().

        Raises:
            ValueError: a parameter that no block has, or a loss that is no scalar.
        """
        self.check_names(params)
        x = self.inputs(context)
        for block in self.blocks:
            x = block(block.of(params), x)
        return scalar(self.loss(x, context))

    def check_names(self, params: Params) -> None:
        """Refuse parameters that are not the model's.

        Raises:
            ValueError: it names them.
        """
        known = {name for block in self.blocks for name in block.names.values()}
        if unknown := [name for name in params if name not in known]:
            raise ValueError(
                f"no block has {', '.join(unknown)}: params must be named as in "
                f"model.named_parameters(), which has {', '.join(sorted(known))}"
            )


def blockwise_gradient(loss: BlockLoss, params: Params, context: Any) -> tuple[Params, Tensor]:
    """`inner_gradient` in mixed mode, a block at a time."""
    pullback = or_by_reverse(by_blocks(loss, params, context))
    found: tuple[Params, Tensor] = recomputed(
        lambda given: block_gradient(loss, *given), (params, context), pullback
    )
    return found


def block_gradient(loss: BlockLoss, params: Params, context: Any) -> tuple[Params, Tensor]:
    """The gradient and the value of a loss, with the graph of one block at a time."""
    loss.check_names(params)
    x, xs, states = loss.inputs(context), [], []
    for block in loss.blocks:
        xs.append(x)
        states.append(RandomState([x]))
        x = block(block.of(params), x)
    cotangent, value = torch.func.grad_and_value(lambda x: scalar(loss.loss(x, context)))(x)
    grads: Params = {name: torch.zeros_like(p) for name, p in params.items()}
    for block, x, state in zip(reversed(loss.blocks), reversed(xs), reversed(states), strict=True):
        with state.restored():
            pull = torch.func.vjp(*_floating(block, block.of(params), x))[1]
        of_block, *of_x = pull(cotangent)
        cotangent = of_x[0] if of_x else cotangent
        _add(grads, block, of_block)
    return grads, value


def by_blocks(loss: BlockLoss, params: Params, context: Any) -> Pullback:
    """The pullback of `block_gradient`: forward over reverse, a block at a time.

    Like `forward_over_reverse`, but with the dual numbers (value, tangent along the cotangent
    u) carried by hand: through the blocks without a graph, then back through the loss and the
    blocks, each evaluated again for its own backward pass.
    """
    names = list(params)
    flat_inputs = flattened(loss.inputs, context)

    def pullback(given: Vector, cotangents: Vector, wanted: Sequence[int]) -> Vector:
        *along, of_value = cotangents
        values, rest = dict(zip(names, given, strict=False)), given[len(names) :]
        tangents = dict(zip(names, along, strict=True))
        chosen = [i - len(names) for i in wanted if i >= len(names)]
        phi = [rest[i] for i in chosen]  # the tensors of the context that need a gradient
        inputs = restrict_to(flat_inputs, rest, chosen)

        before = RandomState(rest)
        x = inputs(*phi)
        xs, dxs, states, dx = [], [], [], torch.zeros_like(x)
        for block in loss.blocks:
            xs.append(x)
            dxs.append(dx)
            states.append(RandomState([x]))
            function, *at = _floating(block, block.of(values), x)
            x, dx = jvp(function, tuple(at), (block.of(tangents), dx)[: len(at)])

        flat_loss = flattened(lambda both: loss.loss(*both), (x, context))

        def loss_gradient(x: Tensor) -> tuple[Tensor, ...]:
            scalar = restrict_to(flat_loss, [x, *rest], [0, *(i + 1 for i in chosen)])
            grads = torch.func.grad(scalar, argnums=tuple(range(1 + len(phi))))(x, *phi)
            found: tuple[Tensor, ...] = grads
            return found

        (c, *phi_grads), (dc, *phi_products) = jvp(loss_gradient, (x,), (dx,))
        grads: Params = {name: torch.zeros_like(p) for name, p in values.items()}
        for block, x, dx, state in zip(
            reversed(loss.blocks), reversed(xs), reversed(dxs), reversed(states), strict=True
        ):
            own, d_own = block.of(values), block.of(tangents)
            with state.restored():
                if x.is_floating_point():
                    back = partial(_back, block)
                    (of_own, c), (d_of_own, dc) = jvp(back, (own, c, x), (d_own, dc, dx))
                else:
                    back = partial(_back, block, x=x)
                    (of_own,), (d_of_own,) = jvp(back, (own, c), (d_own, dc))
            _add(grads, block, {n: of_value * of_own[n] + d_of_own[n] for n in own})

        through_loss = [of_value * g + h for g, h in zip(phi_grads, phi_products, strict=True)]
        if phi and xs[0].is_floating_point():
            with before.restored():
                through_inputs = torch.func.vjp(inputs, *phi)[1](of_value * c + dc)
            through_loss = [a + b for a, b in zip(through_loss, through_inputs, strict=True)]
        of_context = dict(zip(chosen, through_loss, strict=True))
        return [grads[names[i]] if i < len(names) else of_context[i - len(names)] for i in wanted]

    return lambda _, *given: pullback(*given)


def _floating(block: _Block, own: Params, x: Tensor) -> tuple[Any, ...]:
    """A block as a function of what can be differentiated, and that: not of token numbers."""
    if x.is_floating_point():
        return block, own, x
    return (lambda own: block(own, x)), own


def _back(block: _Block, own: Params, cotangent: Tensor, x: Tensor) -> Any:
    return torch.func.vjp(*_floating(block, own, x))[1](cotangent)


def _add(totals: Params, block: _Block, grads: Params) -> None:
    for own, grad in grads.items():
        totals[block.names[own]] = totals[block.names[own]] + grad
