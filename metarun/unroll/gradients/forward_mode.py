"""Forward-mode derivatives that stop where reverse mode stops."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from metarun.unroll._torch import pytree

# By the names of torch's functions and methods, as scripts/op_zoo found them.
NEEDS_GRAPH = frozenset(
    [
        *["cumprod", "cumprod_", "prod", "det", "logdet", "slogdet", "solve"],
        *["linalg_det", "linalg_slogdet", "linalg_solve", "linalg_solve_ex", "linalg_tensorsolve"],
    ]
)
"""Operations whose backward pass, where no graph of it is made, reuses what their forward pass
computed on the side: an LU decomposition, say, which has no tangent."""

WRONG_FORWARD = frozenset({"cholesky_inverse", "triangular_solve"})
"""Operations whose tangents are wrong."""

WRONG_PRODUCTS = frozenset({"scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_"})
"""Operations whose tangents are wrong where they multiply."""


class WrongForwardMode(RuntimeError):
    """An operation whose forward-mode derivative is wrong; the message is its name."""


class ForwardRules(TorchFunctionMode):
    """A context for the functions that a forward-mode derivative is taken of.

    torch's tangents pass through `torch.no_grad()`; a reverse-mode graph ends there, and the
    two must have the same derivative: here they stop as well.

    Attributes:
        needs_graph: whether an operation was met whose backward pass has a tangent only where a
            graph of it is made.

    Raises:
        WrongForwardMode: inside the block, from an operation that torch has a wrong rule for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needs_graph = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in NEEDS_GRAPH:
            self.needs_graph = True
        elif torch.is_grad_enabled() and (
            name in WRONG_FORWARD
            or (name in WRONG_PRODUCTS and _has_word("prod", *args, *(kwargs or {}).values()))
        ):
            raise WrongForwardMode(name)
        outputs = func(*args, **(kwargs or {}))
        return outputs if torch.is_grad_enabled() else detached(outputs)


def _has_word(word: str, *values: Any) -> bool:
    return any(isinstance(value, str) and value == word for value in values)


def jvp(fn: Callable[..., Any], at: tuple[Any, ...], along: tuple[Any, ...]) -> tuple[Any, Any]:
    """`torch.func.jvp` in which results of `torch.no_grad()` blocks inside `fn` are constants.

    Args:
        fn: a function of pytrees of tensors.
        at: its arguments.
        along: their tangents.

    Returns:
        The value and its tangent; themselves differentiable where gradients are enabled.
    """
    if not torch.is_grad_enabled():
        at, along = detached(at), detached(along)  # enabled below, yet nothing to record
    with torch.enable_grad(), ForwardRules():
        value, tangent = torch.func.jvp(fn, at, along)[:2]
    return value, tangent


def dual_gradient(
    scalar: Callable[..., Tensor],
    at: Sequence[Tensor],
    along: Sequence[Tensor],
    wanted: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient of a scalar function and its tangent, where no transform surrounds them.

    What `jvp` of `torch.func.grad` computes, by plain autograd on dual numbers: two layers of
    wrappers less.

    Args:
        scalar: a function of tensors.
        at: its arguments.
        along: tangents of the first ones.
        wanted: numbers of the arguments that gradients are taken with respect to.
    """
    with torch.enable_grad(), forward_ad.dual_level(), ForwardRules() as rules:
        values = [x.detach() for x in at]
        for i in wanted:
            values[i].requires_grad_()
        for i, tangent in enumerate(along):
            values[i] = forward_ad.make_dual(values[i], tangent)  # type: ignore[no-untyped-call]
        targets = [values[i] for i in wanted]
        value = scalar(*values)
        found = torch.autograd.grad(
            value, targets, create_graph=rules.needs_graph, materialize_grads=True
        )
        pairs = [forward_ad.unpack_dual(grad) for grad in found]  # type: ignore[no-untyped-call]
        tangents = [torch.zeros_like(p) if t is None else t.detach() for p, t in pairs]
        return [p.detach() for p, _ in pairs], tangents


def detached(tree: Any) -> Any:
    """A pytree whose floating-point tensors are constants."""
    return pytree.tree_map(
        lambda x: x.detach() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )
