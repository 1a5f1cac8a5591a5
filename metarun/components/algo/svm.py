"""The multi-class support vector machine of Crammer and Singer (2001), as a differentiable layer.

Its dual is a quadratic program (Lee et al. 2019, equations 8 and 9), and an interior-point method
with a fixed number of iterations solves it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TO_BOUNDARY = 0.995  # how much of the way to the boundary a step may go
CONVERGED = 1e-12  # the relative duality gap from which on the solution stands
SHARPER = 1e-6  # a converged product of slack and multiplier, to its derivative
JITTER = 1e-10  # of the largest diagonal element: added to a kernel, which may be singular

OF_TASK = (-2, -1)  # dimensions of one task's values: classes and examples


class Solved(NamedTuple):
    """The solution of the dual.

    Attributes:
        alpha: the coefficients, (way, examples), of the type that was given.
        gap: the duality gap, (), at least 0.
    """

    alpha: Tensor
    gap: Tensor


class _Point(NamedTuple):
    """An iterate: the slack of the bounds, their multipliers, and those of the sums over classes.

    The coefficients are bound − slack, so that small slacks lose no digits.
    """

    slack: Tensor  # (…, way, examples)
    bound_dual: Tensor  # (…, way, examples)
    sum_dual: Tensor  # (…, 1, examples)


def crammer_singer(kernel: Tensor, labels: Tensor, cost: float, iterations: int) -> Solved:
    """Fit the machine without an intercept.

    It maximises Σ_i α_{y_i,i} − ½ Σ_k α_k·K·α_k subject to α_{k,i} ≤ C·[k = y_i] and
    Σ_k α_{k,i} = 0, which is the dual of ½ Σ_k ‖w_k‖² + C Σ_i ξ_i with
    ξ_i = max_k (w_k·x_i − w_{y_i}·x_i + 1 − [k = y_i]). Then w_k = Σ_i α_{k,i} x_i.

    The method is Mehrotra's (1992), from a point that is strictly feasible, in float64. Newton's
    system has a block for each class and one of the size of the examples for the sums. A step that
    cannot be computed is not taken: the gap tells. The kernel gets `JITTER` on its diagonal: where
    it is singular, as with more examples than features, many α give the same w, and derivatives
    would be those of rounding errors.

    The derivative by the kernel is that of the equations which the last iterate fulfils (the
    implicit function theorem). Where the method has converged, products of slack and multiplier
    count as `SHARPER` times what they are: one that is almost 0 on both sides would give it an
    error of the square root of the gap. Elsewhere they count as they are. There is no second
    derivative: what is differentiated again is a constant.

    Args:
        kernel: K, (examples, examples), symmetric and positive semi-definite.
        labels: rows of 0 and 1, (examples, way).
        cost: C.
        iterations: how many are taken.
    """
    k, y = kernel.detach().double(), labels.detach().double().T.contiguous()
    largest = k.diagonal().amax(0)  # of a dimension: ONNX has no operation for all of them
    k = k + torch.diag_embed((JITTER * largest).expand(k.shape[0]))
    # An exported file has the iterations: it is for processes that do not know the operation.
    solution = _iterate if torch.compiler.is_exporting() else _solution
    point = _Point(*solution(k, y, cost, iterations))
    alpha = cost * y - point.slack
    gap = _gap(k, y, cost, alpha)
    solve = _newton(k, _sharpen(point, cost, gap <= _least_gap(y, cost)))
    # Minus the residual's change with the kernel, of which only the derivative is not zero.
    change = kernel.double() - kernel.detach().double()
    moved, _ = solve(-(alpha @ change), torch.zeros_like(point.sum_dual))
    return Solved((alpha + moved).to(kernel.dtype), gap[0, 0].to(kernel.dtype))


def _sharpen(point: _Point, cost: float, converged: Tensor) -> _Point:
    """The point with a smaller slack where a bound holds, and a smaller multiplier elsewhere."""
    factor = torch.where(converged, SHARPER, 1.0)
    holds = cost * point.bound_dual > point.slack
    return point._replace(
        slack=torch.where(holds, factor * point.slack, point.slack),
        bound_dual=torch.where(holds, point.bound_dual, factor * point.bound_dual),
    )


def _iterate(k: Tensor, y: Tensor, cost: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last iterate."""
    point = _start(k, y, cost)
    for _ in range(iterations):
        point = _step(k, y, cost, point)
    return point.slack.contiguous(), point.bound_dual.contiguous(), point.sum_dual.contiguous()


@torch.library.custom_op("metarun::crammer_singer", mutates_args=())
def _solution(k: Tensor, y: Tensor, cost: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one operation of a recording: hundreds would take minutes to compile."""
    return _iterate(k, y, cost, iterations)


@_solution.register_fake
def _(k: Tensor, y: Tensor, cost: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(*y.shape[:-2], 1, y.shape[-1])


@_solution.register_vmap
def _(
    info: Any, dims: Any, k: Tensor, y: Tensor, cost: float, iterations: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    first = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in ((k, dims[0]), (y, dims[1]))
    ]
    return _solution(*first, cost, iterations), (0, 0, 0)


def _start(k: Tensor, y: Tensor, cost: float) -> _Point:
    """A point within all bounds, at which the scores of an example differ by 1 at the most."""
    towards = y - 1 / y.shape[-2]
    scores = towards @ k
    spread = (scores.amax(-2, True) - scores.amin(-2, True)).amax(OF_TASK, True)
    alpha = torch.minimum(torch.full_like(spread, cost), 1 / spread) * towards
    slope = alpha @ k - y
    highest = slope.amax(-2, True)
    # The multipliers are alike within a factor of 2.
    margin = (highest - slope).amax(OF_TASK, True).clamp(min=1)
    return _Point(cost * y - alpha, highest - slope + margin, -(highest + margin))


def _step(k: Tensor, y: Tensor, cost: float, point: _Point) -> _Point:
    """A step of Mehrotra's predictor and corrector; a converged point stands."""
    slack, dual, sum_dual = point
    alpha = cost * y - slack
    slope = alpha @ k - y + dual + sum_dual
    sums = alpha.sum(-2, True)
    solve = _newton(k, point)

    def direction(products: Tensor) -> _Point:
        """Where the products of slack and multiplier fall by so much."""
        change, by_sums = solve(products / slack - slope, -sums)
        return _Point(-change, (dual * change - products) / slack, by_sums)

    mean = (slack * dual).mean(OF_TASK, True)
    ahead = direction(slack * dual)
    full = _length(point, ahead)
    reached = (slack + full * ahead.slack) * (dual + full * ahead.bound_dual)
    centre = (reached.mean(OF_TASK, True) / mean).pow(3) * mean
    chosen = direction(slack * dual + ahead.slack * ahead.bound_dual - centre)
    length = TO_BOUNDARY * _length(point, chosen)
    found = [value + length * change for value, change in zip(point, chosen, strict=True)]
    finite = torch.cat(found, -2).isfinite().all(-1, True).all(-2, True)
    moves = finite & (_gap(k, y, cost, alpha) > _least_gap(y, cost))
    return _Point(*(torch.where(moves, *pair) for pair in zip(found, point, strict=True)))


def _newton(k: Tensor, point: _Point) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`solve(right, sums) -> (change of α, change of the sums' multipliers)` at a point.

    It solves (K + D_k) δ_k + ν = right_k for each class and Σ_k δ_k = sums, where D_k is the
    diagonal of multipliers over slacks.
    """
    blocks = k[..., None, :, :] + torch.diag_embed(point.bound_dual / point.slack)
    factors = torch.linalg.cholesky_ex(blocks).L
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device).expand_as(blocks)
    schur = torch.linalg.cholesky_ex(torch.cholesky_solve(eye, factors).sum(-3)).L

    def solve(right: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        alone = torch.cholesky_solve(right[..., None], factors)[..., 0]
        shared = torch.cholesky_solve((alone.sum(-2, True) - sums).mT, schur).mT
        bent = torch.cholesky_solve(shared.expand_as(alone)[..., None], factors)[..., 0]
        return alone - bent, shared

    return solve


def _length(point: _Point, change: _Point) -> Tensor:
    """The longest step, of 1 at the most, that keeps slacks and multipliers above 0."""
    values = torch.cat([point.slack, point.bound_dual], -2)
    changes = torch.cat([change.slack, change.bound_dual], -2)
    falls = changes < 0
    ratios = torch.where(falls, -values / torch.where(falls, changes, -1.0), torch.inf)
    return ratios.amin(OF_TASK, True).clamp(max=1)


def _least_gap(y: Tensor, cost: float) -> float:
    """The gap at which the solution stands."""
    return CONVERGED * cost * y.shape[-1]


def _gap(k: Tensor, y: Tensor, cost: float, alpha: Tensor) -> Tensor:
    """The machine's objective with these coefficients less that of the dual, (…, 1, 1).

    ½‖w − w*‖² is at most that, since the objective is strongly convex.
    """
    scores = alpha @ k
    losses = (scores + 1 - y).amax(-2, True) - (y * scores).sum(-2, True)
    terms = (alpha * scores).sum(-2, True) + cost * losses - (y * alpha).sum(-2, True)
    return terms.sum(-1, True).clamp(min=0)
