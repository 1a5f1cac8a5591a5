"""One gradient of the inner loss, and what is remembered of it for the outer derivative."""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarun.unroll._torch import import_forward_rules
from metarun.unroll.gradients.forward_mode import (
    ForwardRules,
    WrongForwardMode,
    detached,
    dual_gradient,
    jvp,
)
from metarun.unroll.gradients.recompute import (
    Flat,
    Pullback,
    RandomState,
    Recomputation,
    by_reverse,
    flattened,
    plain_autograd_will_do,
    recomputed,
    restrict_to,
)
from metarun.unroll.optim.base import Params

ContextLoss = Callable[[Params, Any], Tensor]
"""`loss(params, context)`, a scalar."""

Remember = Literal["reverse", "first_order", "checkpoint", "mixed"]


def inner_gradient(
    loss: ContextLoss, params: Params, context: Any, remember: Remember
) -> tuple[Params, Tensor]:
    """The gradient of the inner loss and its value, differentiable in the given way.

    Args:
        loss: a function of the parameters and of the context.
        params: where the gradient is taken.
        context: a pytree.
        remember: "reverse" keeps the graph of the gradient, "first_order" nothing, "checkpoint"
            and "mixed" the arguments, of which they recompute the rest.
    """

    if remember == "reverse":
        return loss_gradient(loss, params, context)
    if remember == "first_order":
        # `torch.func.vjp` differentiates within its own level whatever surrounds it; no_grad
        # outside it only keeps the *outer* level from recording, which is first order exactly.
        # Detached as well, because forward-mode tangents would pass through no_grad.
        with torch.no_grad():
            constants: tuple[Params, Tensor] = detached(loss_gradient(loss, params, context))
        return constants
    pullback: Pullback = by_reverse
    if remember == "mixed":
        pullback = or_by_reverse(forward_over_reverse(loss, (params, context)))
    found: tuple[Params, Tensor] = recomputed(
        lambda given: loss_gradient(loss, *given), (params, context), pullback
    )
    return found


def loss_gradient(loss: ContextLoss, params: Params, context: Any) -> tuple[Params, Tensor]:
    """The gradient of a loss with respect to the parameters, and its value."""
    # By vjp, not grad_and_value: that one prepares a second derivative even where none can
    # follow, in first order and in what is recomputed later.
    value, pull = torch.func.vjp(lambda p: dependent(loss)(p, context), params)[:2]
    return pull(torch.ones_like(value))[0], value


def one_number(loss_fn: Callable[..., Any], *args: Any) -> Tensor:
    """`loss_fn(*args)`, which must be a scalar that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no 2nd derivative
        return scalar(loss_fn(*args))


def scalar(value: Any) -> Tensor:
    """The value of a loss, which must be one number."""
    if value is None:
        raise ValueError("the inner loss must be a scalar tensor, not None: does it `return` one?")
    if not isinstance(value, Tensor) or value.dim() != 0:
        seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the inner loss must be a scalar tensor, not {seen}: take its mean or sum, and return "
            "nothing else"
        )
    if not value.is_floating_point():
        raise ValueError(
            f"the inner loss must be a real number, not of the type {value.dtype}, which has no "
            "gradient: compute it in floating point (of a complex one, .abs() or .real)"
        )
    return value


def dependent(loss: ContextLoss) -> ContextLoss:
    """The loss, which must depend on the parameters; for use within `torch.func.vjp` or `grad`."""

    def checked(params: Params, context: Any) -> Tensor:
        value = loss(params, context)
        if not value.requires_grad:
            raise ValueError(
                "the inner loss does not depend on the parameters that it is given: compute it "
                "from them, with torch.func.functional_call(model, params, (x,)) for a module"
            )
        return value

    return checked


def forward_over_reverse(loss: ContextLoss, given: tuple[Params, Any]) -> Pullback:
    """The pullback of `inner_gradient` by one forward-mode derivative.

    The gradient g of a scalar has a symmetric Jacobian. So for a cotangent u on g, both H·u and
    (∂g/∂context)ᵀ·u are tangents of (∂loss/∂params, ∂loss/∂context) along (u, 0): the walk
    through the inner backward pass needs no graph (MixFlow-MG, Kemaev et al. 2025,
    arXiv 2505.00793).

    Args:
        loss: a function of the parameters and of the context.
        given: these two, for their structure.
    """
    loss_of = flattened(lambda both: loss(*both), given)

    def pullback(
        fn: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[int]
    ) -> Sequence[Tensor]:
        *along, of_value = cotangents

        def flat_loss(*values: Tensor) -> Tensor:
            value: Tensor = loss_of(*values)
            if isinstance(fn, Recomputation):
                fn.compare([value], [len(along)])  # behind the gradients
            return value

        params = tuple(inputs[: len(along)])  # a pytree of (params, context) begins with params

        def wanted_gradient(*moved: Tensor) -> tuple[Tensor, ...]:
            every = [*moved, *inputs[len(along) :]]
            of_targets = restrict_to(flat_loss, every, wanted)
            with ForwardRules() as rules:
                value, pull = torch.func.vjp(of_targets, *(every[i] for i in wanted))[:2]
            # Most tangents need no graph of this gradient; a third derivative does.
            graph = recording or rules.needs_graph
            grads: tuple[Tensor, ...] = pull(torch.ones_like(value), create_graph=graph)
            return grads

        recording = torch.is_grad_enabled()
        if plain_autograd_will_do([*inputs, *cotangents]):
            grads, products = dual_gradient(flat_loss, inputs, along, wanted)
        else:
            grads, products = jvp(wanted_gradient, params, tuple(along))
        return [product + of_value * grad for product, grad in zip(products, grads, strict=True)]

    return pullback


def or_by_reverse(pullback: Pullback) -> Pullback:
    """A forward-mode pullback that falls back, loudly, where torch has no forward mode."""
    load_forward_rules()

    def with_fallback(
        fn: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[int]
    ) -> Sequence[Tensor]:
        random_state = RandomState(inputs)
        try:
            return pullback(fn, inputs, cotangents, wanted)
        except RuntimeError as error:  # NotImplementedError is one
            _warn_without_forward_mode(error)
        with random_state.restored():
            return by_reverse(fn, inputs, cotangents, wanted)

    return with_fallback


def _warn_without_forward_mode(error: RuntimeError) -> None:
    """Say which operation has no forward mode; raise `error` again if it is another one."""
    text = str(error)
    reason = "torch has no forward mode for"
    missing = re.search(r"forward AD with (\S+) that does not support it", text)
    if isinstance(error, WrongForwardMode):
        reason, operation = "torch's forward mode is wrong for", text
    elif missing:
        operation = missing.group(1)
    elif "must implement the jvp function" in text:
        operation = "a custom autograd.Function"
    elif "Nested forward mode AD" in text:
        operation = "a forward-mode derivative inside another"
    elif "ZeroTensors are immutable" in text:
        operation = "mse_loss, or another that writes over a zero tangent"
    else:
        raise error
    warnings.warn(
        f"gradient='mixed' falls back to 'checkpoint': {reason} {operation}. "
        "The result is exact all the same; replace the operation (a mean squared error by "
        "(x - y).pow(2).mean(), say) or choose gradient='checkpoint'",
        stacklevel=2,
    )


@cache
def load_forward_rules() -> None:
    """Import torch's rules for forward mode, once and silently."""
    # torch compiles some rules for forward mode at their first use, and warns that the compiler
    # it uses for that is deprecated: not the user's concern.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        import_forward_rules()
