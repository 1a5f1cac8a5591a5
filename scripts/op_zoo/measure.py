"""Derivatives of a whole unroll through one operation, against finite differences."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from metarun import higher as drop_in
from metarun.unroll import meta_gradient, multi, newton, sgd, unroll

Params = dict[str, Tensor]
STEPS, NEWTON_STEPS = 2, 3
TASKS = 2
LENGTHS = (0.1, 0.01)  # of a step, in lengths of the parameters; the first where they are smooth
LARGEST_NEWTON = 8  # elements of the last dimension, each of which costs a Hessian product
WAYS = [
    *(f"{mode}, {batching}" for mode in ("reverse", "checkpoint", "mixed") for batching in
      ("loop", "vmap")),
    "drop-in", "newton, loop", "newton, vmap", "newton, multi",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An operation at one point.

    Attributes:
        fn: from parameters to a pytree with at least one floating-point tensor.
        params: the point, in float64.
        module: what `fn` calls, with these parameters, if it is a module; for the drop-in.
        inputs: the module's.
    """

    fn: Callable[[Params], Any]
    params: Params
    module: nn.Module | None = None
    inputs: tuple[Any, ...] = ()


def of_module(module: nn.Module, *inputs: Any, loss: Callable[..., Any] = lambda x: x) -> Case:
    """A module and what is made of its outputs."""
    params = {name: p.detach().clone() for name, p in module.named_parameters()}

    def fn(params: Params) -> Any:
        return loss(functional_call(module, params, inputs))

    return Case(fn, params, _Then(module, loss), inputs)


class _Then(nn.Module):
    def __init__(self, module: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, *inputs: Any) -> Any:
        return self.loss(self.module(*inputs))


class _Holder(nn.Module):
    """The parameters of an operation as those of a module."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.names = list(case.params)
        self.weights = nn.ParameterList(list(case.params.values()))
        self.fn = case.fn

    def forward(self) -> Any:
        return self.fn(dict(zip(self.names, self.weights, strict=True)))


class Unusable(Exception):
    """An operation cannot be measured here; the message says why."""


def projected(outputs: Any, scale: float, task: Tensor | float) -> Tensor:
    """A fixed nonlinear function of all outputs, a scalar, with derivatives of every order."""
    flat = _flat(outputs) / scale
    at = torch.arange(flat.numel(), dtype=flat.dtype)
    return ((1.5 + torch.sin(3 * at + 1)) * torch.sin(flat + 2 * at + 0.3 * task)).mean()


def _flat(outputs: Any) -> Tensor:
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            if leaf.layout != torch.strided:
                raise Unusable("it gives a sparse tensor")
            if leaf.dtype not in (torch.float64, torch.complex128):
                raise Unusable("it rounds to a lower precision")
            found.append((torch.view_as_real(leaf) if leaf.is_complex() else leaf).reshape(-1))
    if not found or not sum(leaf.numel() for leaf in found):
        raise Unusable("it gives no floating-point number")
    return torch.cat([leaf.double() for leaf in found])


def _draws(fn: Callable[[Params], Any], params: Params, flat: Tensor) -> bool:
    """Whether an operation draws random numbers, be it from a seed that it sets itself."""

    def of_task(task: Tensor) -> Tensor:
        return _flat(fn(params)) + 0 * task

    with torch.no_grad():
        torch.manual_seed(1)
        if not torch.equal(_flat(fn(params)), flat):
            return True
        try:
            one, other = torch.func.vmap(of_task, randomness="different")(torch.zeros(2))
        except Exception:  # which the derivative itself will meet
            return False
        return not torch.equal(one, other)


class Problem:
    """An unroll through an operation: start, loss, rate, what is asked of its end, direction."""

    def __init__(self, case: Case, length: float) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)

        def random(p: Tensor) -> Tensor:
            return torch.randn(p.shape, dtype=p.dtype, generator=generator)

        self.start = {name: p.detach().clone() for name, p in case.params.items()}
        sizes = {n: float(p.square().mean().sqrt()) or 1.0 for n, p in self.start.items()}
        self.phases = {name: random(p) for name, p in self.start.items()}
        self.sizes = sizes
        self.along = {name: sizes[name] * random(p) for name, p in self.start.items()}
        with torch.no_grad():
            torch.manual_seed(0)
            flat = _flat(case.fn(self.start))
        self.scale = float(flat.square().mean().sqrt())
        if not math.isfinite(self.scale):
            raise Unusable("it is not finite here")
        if self.scale < 1e-8:  # zero up to rounding
            self.scale = 1.0
        self.random = _draws(case.fn, self.start, flat)
        leaves = {name: p.clone().requires_grad_() for name, p in self.start.items()}
        torch.manual_seed(0)
        value = self.loss(leaves, 0, torch.zeros((), dtype=torch.float64))
        if not value.requires_grad:
            raise Unusable("it does not depend on what it is given")
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        slope = torch.cat([g.flatten() for g in grads]).square().mean().sqrt()
        size = torch.cat([p.flatten() for p in self.start.values()]).square().mean().sqrt()
        self.lr = float(length * size / slope) if slope > 0 and torch.isfinite(slope) else length
        self.lr = self.lr or length
        self.lr = min(self.lr, 100.0)

    def loss(self, params: Params, step: int, task: Tensor) -> Tensor:
        """The inner loss."""
        return projected(self.case.fn(params), self.scale, task + 0.1 * step)

    def outer(self, end: Params) -> Tensor:
        """A nonlinear scalar of where the unroll ended."""
        terms = [
            torch.sin(p / self.sizes[name] + self.phases[name]).sum() for name, p in end.items()
        ]
        return torch.stack(terms).sum()

    def optimizer(self, way: str) -> tuple[Any, int]:
        """The optimizer and its number of steps."""
        if way.startswith("newton"):
            return newton(damping=1 / self.lr), NEWTON_STEPS
        return sgd(self.lr), STEPS

    def value(self, params: Params, task: Tensor, way: str, gradient: Any) -> Tensor:
        """What is differentiated, for one task."""
        optimizer, steps = self.optimizer(way)
        end = unroll(self.loss, params, optimizer, steps, context=task, gradient=gradient)
        return self.outer(end.params)

    def tasks(self, batched: bool) -> Tensor:
        """(tasks,): what tells one task from another."""
        return torch.arange(TASKS if batched else 1, dtype=torch.float64)

    def derivative(self, way: str) -> float:
        """The directional derivative of the mean over tasks, by the way of this name."""
        torch.manual_seed(0)
        mode, _, how = way.partition(", ")
        if way == "drop-in":
            return self._by_drop_in()
        if way == "newton, multi":
            return self._by_multi()
        gradient = "reverse" if mode == "newton" else mode

        def task_loss(meta: Any, task: Tensor) -> tuple[Tensor, Tensor]:
            value = self.value(dict(meta), task, way, gradient)
            return value, value

        grads, _ = meta_gradient(task_loss, self.start, self.tasks(how == "vmap"), how)  # type: ignore[arg-type]
        return self._along(grads)

    def _along(self, grads: Params) -> float:
        return float(sum((grads[name] * self.along[name]).sum() for name in grads))

    def _by_drop_in(self) -> float:
        case, task = self.case, torch.zeros((), dtype=torch.float64)
        model = case.module or _Holder(case)
        opt = torch.optim.SGD(model.parameters(), lr=self.lr)
        names = list(case.params)
        with drop_in.innerloop_ctx(model, opt, copy_initial_weights=False) as (fast, diff):
            torch.manual_seed(0)
            for step in range(STEPS):
                diff.step(projected(fast(*case.inputs), self.scale, task + 0.1 * step))
            value = self.outer(dict(zip(names, fast.fast_params, strict=True)))
        grads = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        return self._along(dict(zip(names, grads, strict=True)))

    def _by_multi(self) -> float:
        leaves = {name: p.clone().requires_grad_() for name, p in self.start.items()}
        optimizer, params = multi.Newton(damping=1 / self.lr), leaves
        for step in range(NEWTON_STEPS):
            loss = self.loss(params, step, torch.zeros((), dtype=torch.float64))
            params = optimizer.get_step(loss, params)
        grads = torch.autograd.grad(
            self.outer(params), list(leaves.values()), materialize_grads=True
        )
        return self._along(dict(zip(leaves, grads, strict=True)))

    def smooth(self, way: str) -> bool:
        """Whether finite differences converge, so that they can be compared with."""
        try:
            _, error, scale = self.expected(way)
        except Unusable:
            raise
        except Exception:  # which the derivative itself will meet
            return True
        return error < 1e-4 * scale

    def expected(self, way: str) -> tuple[float, float, float]:
        """The derivative by finite differences, their error, and the scale that counts.

        That scale is how far the derivative is from first order: what would be missing if all
        derivatives beyond the first were zero.
        """
        batched, is_newton = way.endswith("vmap"), way.startswith("newton")
        if batched and self.random:  # other numbers for each task
            found, error = self._differences(is_newton, None)
            return found, error, abs(found)
        each = [self._differences(is_newton, float(t)) for t in self.tasks(batched)]
        found, error = (sum(values) / len(each) for values in zip(*each, strict=True))
        if is_newton:
            return found, error, abs(found)
        first = sum(self._first_order(float(t)) for t in self.tasks(batched)) / len(each)
        beyond = abs(found - first) if math.isfinite(first) else abs(found)
        return found, error, max(beyond, 1e-3 * abs(found), 1e-9)

    @functools.cache  # noqa: B019 - a problem lives as long as its results
    def _differences(self, is_newton: bool, task: float | None) -> tuple[float, float]:
        way = "newton" if is_newton else "sgd"

        def at(h: float) -> float:
            params = {name: p + h * self.along[name] for name, p in self.start.items()}

            def value(task: Tensor) -> Tensor:
                return self.value(params, task, way, "reverse")

            with torch.no_grad():
                torch.manual_seed(0)
                if task is None:
                    each = torch.func.vmap(value, randomness="different")(self.tasks(True))
                    return float(each.mean())
                return float(value(torch.tensor(task, dtype=torch.float64)))

        best, error = math.nan, math.inf
        for h in (4e-4, 4e-5):
            found, uncertain = extrapolated(at, h)
            if uncertain < error:
                best, error = found, uncertain
            if error < 1e-6 * (abs(best) + 1e-3):
                break
        return best, error

    @functools.cache  # noqa: B019
    def _first_order(self, task: float) -> float:
        torch.manual_seed(0)
        leaves = {name: p.clone().requires_grad_() for name, p in self.start.items()}
        value = self.value(leaves, torch.tensor(task, dtype=torch.float64), "sgd", "first_order")
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return self._along(dict(zip(leaves, grads, strict=True)))


def extrapolated(at: Callable[[float], float], h: float) -> tuple[float, float]:
    """Central differences with steps h and h/2, extrapolated (Richardson), and their error.

    The difference of the two is far above the error of what is extrapolated where the function is
    smooth, and of the size of the whole where it is not. A kink at zero they do not see: there the
    slopes of both sides differ, by as much for a small step as for a large one.
    """
    middle, sides = at(0.0), [(at(s), at(-s), s) for s in (h, h / 2)]
    wide, narrow = ((right - left) / (2 * s) for right, left, s in sides)
    bends = [(right - 2 * middle + left) / s for right, left, s in sides]
    error = abs(narrow - wide) + abs(2 * bends[1] - bends[0])
    return (narrow + (narrow - wide) / 3, error) if math.isfinite(error) else (math.nan, math.inf)


def measured(case: Case, ways: Sequence[str] = WAYS) -> Iterator[tuple[str, str, str]]:
    """For each way: its name, the verdict, and a remark.

    Verdicts are "right", "wrong", "not finite" (the derivative is, by finite differences, but not
    by this way), "refused", "not smooth" (finite differences do not converge) and "skipped".
    """
    try:
        for length in LENGTHS:
            problem = Problem(case, length)
            if problem.smooth("reverse, loop"):
                break
    except Unusable as error:
        yield from ((way, "skipped", str(error)) for way in ways)
        return
    except Exception as error:
        yield from ((way, "refused", _said(error)) for way in ways)
        return
    for way in ways:
        yield way, *_verdict(problem, way)


def _verdict(problem: Problem, way: str) -> tuple[str, str]:
    if way.startswith("newton"):
        size = max(p.shape[-1] if p.dim() else 1 for p in problem.start.values())
        if size > LARGEST_NEWTON:
            return "skipped", f"more than {LARGEST_NEWTON} elements in a variable"
    if problem.random and way == "newton, multi":
        return "skipped", "draws random numbers"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours = problem.derivative(way)
        except Exception as error:
            return "refused", _said(error)
        try:
            right, error, scale = problem.expected(way)
        except Exception as failure:
            return "refused", _said(failure)
    fallback = [str(w.message) for w in caught if "falls back" in str(w.message)]
    remark = fallback[0] if fallback else ""
    if not problem.smooth(way):
        return "not smooth", remark
    if not math.isfinite(ours):
        return "not finite", remark
    off = abs(ours - right)
    if off <= 1e-5 * scale + error:
        return "right", remark
    return "wrong", f"{ours:.8g} instead of {right:.8g}, off by {off / scale:.1e} of its 2nd order"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
