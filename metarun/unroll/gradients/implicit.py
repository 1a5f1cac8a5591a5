"""Implicit differentiation of an inner loop that ends near a minimum."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.unroll.gradients.inner import ContextLoss
from metarun.unroll.gradients.modes import Implicit
from metarun.unroll.gradients.recompute import Flat, Pullback, flattened, recomputed, restrict_to
from metarun.unroll.optim.base import Params

Vector = Sequence[Tensor]  # one vector in the space of all parameters, in pieces


def attach_implicit(
    solution: Params,
    start: Params,
    context: Any,
    loss: ContextLoss,
    mode: Implicit,
    proximal: float | None = None,
) -> Params:
    """The solution of the proximal inner problem, with its implicit derivative.

    Args:
        solution: where the inner loop ended; taken as a constant.
        start: the initial parameters, to which the proximal term ties the solution.
        context: what else the inner loss depends on.
        loss: the inner loss, without its proximal term.
        mode: how strong that term is, and how the linear system is solved.
        proximal: how strong it is, in place of what `mode` says: 0 where the loss has one already.
    """
    strength = mode.proximal if proximal is None else proximal
    fixed = {name: p.detach() for name, p in solution.items()}
    given = (fixed, start, context)
    pullback = _implicit_pullback(loss, given, mode, strength)
    attached: Params = recomputed(lambda each: dict(each[0]), given, pullback, keep_outputs=True)
    return attached


def _implicit_pullback(
    loss: ContextLoss, given: tuple[Params, Params, Any], mode: Implicit, strength: float
) -> Pullback:
    flat_loss = flattened(lambda both: loss(*both), (given[0], given[2]))
    count = len(given[0])

    def pullback(_: Flat, inputs: Vector, cotangents: Vector, wanted: Sequence[int]) -> Vector:
        # At the solution as it came out, with its derivative, for the sake of second ones.
        point = [*inputs[-count:], *inputs[2 * count : -count]]  # params and context
        of_context = [i - count for i in wanted if i >= 2 * count]
        moving = [*range(count), *of_context]

        def gradient(*values: Tensor) -> tuple[Tensor, ...]:
            every = restrict_to(lambda *each: each, point, moving)(*values)
            grad = torch.func.grad(flat_loss, argnums=tuple(range(count)))
            found: tuple[Tensor, ...] = grad(*every)
            return found

        # The Jacobian of a gradient is symmetric, so this pulls back v to (H·v, ∂²L/∂context∂θ·v).
        second = torch.func.vjp(gradient, *(point[i] for i in moving))[1]

        def system(v: Vector) -> Vector:
            products = second(tuple(v))[:count]
            return [hv + strength * x for hv, x in zip(products, v, strict=True)]

        v = solve(system, cotangents, mode)
        of_start = {count + i: strength * x for i, x in enumerate(v)}
        products = second(tuple(v))[count:]
        context_grads = dict(zip(of_context, (-x for x in products), strict=True))
        return [of_start[i] if i < 2 * count else context_grads[i - count] for i in wanted]

    return pullback


def solve(system: Callable[[Vector], Vector], right: Vector, mode: Implicit) -> Vector:
    """Approximately solve system(v) = right, by the steps that `mode` says."""
    if mode.solver == "cg":
        return conjugate_gradients(system, right, mode.solver_steps)
    if mode.solver == "neumann":
        return neumann(system, right, mode.solver_steps, mode.solver_lr)
    return fixed_point(system, right, mode.solver_steps, mode.solver_lr)


def conjugate_gradients(system: Callable[[Vector], Vector], right: Vector, steps: int) -> Vector:
    """Conjugate gradients from zero, for a symmetric positive definite system.

    Stops changing its iterate, and so returns the current one, once the residual is zero up to
    rounding or a direction of negative curvature turns up (then the system is not definite).
    """
    x: Vector = [torch.zeros_like(b) for b in right]
    residual: Vector = list(right)
    direction: Vector = list(right)
    squared = _dot(residual, residual)
    enough = squared * torch.finfo(squared.dtype).eps ** 2
    for _ in range(steps):
        image = system(direction)
        curvature = _dot(direction, image)
        going = (squared > enough) & (curvature > 0)
        length = torch.where(going, squared / torch.where(going, curvature, 1.0), 0.0)
        x = _add(x, length, direction)
        residual = _add(residual, -length, image)
        next_squared = _dot(residual, residual)
        ratio = torch.where(going, next_squared / torch.where(going, squared, 1.0), 0.0)
        direction = _add(residual, ratio, direction)
        squared = torch.where(going, next_squared, torch.zeros_like(squared))
    return x


def neumann(system: Callable[[Vector], Vector], right: Vector, terms: int, lr: float) -> Vector:
    """lr · Σ (I − lr · system)ᵏ · right for k = 0 … terms."""
    power: Vector = list(right)
    total: Vector = list(right)
    for _ in range(terms):
        power = _add(power, -lr, system(power))
        total = _add(total, 1.0, power)
    return [lr * x for x in total]


def fixed_point(system: Callable[[Vector], Vector], right: Vector, steps: int, lr: float) -> Vector:
    """v ← v − lr · (system(v) − right), from zero."""
    v: Vector = [torch.zeros_like(b) for b in right]
    for _ in range(steps):
        v = _add(_add(v, -lr, system(v)), lr, right)
    return v


def _dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _add(a: Vector, factor: float | Tensor, b: Vector) -> Vector:
    return [x + factor * y for x, y in zip(a, b, strict=True)]
