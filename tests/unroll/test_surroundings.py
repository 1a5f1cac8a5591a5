"""A loss that changes what is around it: each mode finds what "reverse" finds, or refuses."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import metarun.higher as higher
from metarun.unroll import (
    BlockLoss,
    Checkpoint,
    Evolution,
    RecordedLoss,
    meta_gradient,
    recorded,
    sgd,
    unroll,
)
from metarun.unroll.advice import UnsuitableModel

F64 = torch.float64
EXACT = ["checkpoint", "mixed", Checkpoint(2)]
OTHERS = [*EXACT, "implicit", Evolution(2)]
X = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
W = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))

Loss = Callable[[dict[str, Tensor], int], Tensor]


class Running(nn.Module):
    """Divides by a running mean that each evaluation moves on."""

    def __init__(self, keeps: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        super().__init__()
        self.weight = nn.Parameter(W.clone())
        self.register_buffer("scale", torch.ones((), dtype=F64))
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.T
        if self.training:
            self.scale = 0.5 * self.scale + self.keeps(out.pow(2).mean())
        return out / self.scale


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(W.clone()), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x @ self.weight.T) / self.calls


class Listed(Annealed):
    """Keeps its count in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counts["calls"] += 1
        return torch.tanh(x @ self.weight.T) / self.counts["calls"]


def spectral(wrap: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "older spectral norm": lambda: spectral(nn.utils.spectral_norm),
    "running buffer": Running,
    "within another": lambda: nn.Sequential(Running(), nn.Tanh()),
    "counter": Annealed,
    "counter in a dict": Listed,
}
BUFFERS = ["spectral norm", "older spectral norm", "running buffer", "within another"]


def of_module(model: nn.Module) -> tuple[Loss, dict[str, Tensor]]:
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    return lambda p, step: functional_call(model, p, (X,)).cos().mean(), params


def counting() -> tuple[Loss, dict[str, Tensor]]:
    calls = 0

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(X @ p["w"].T).pow(2).mean() / calls

    return loss, {"w": W.clone().requires_grad_()}


counted = 0


def counting_globally() -> tuple[Loss, dict[str, Tensor]]:
    global counted
    counted = 0

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        return helper(p["w"])

    def helper(w: Tensor) -> Tensor:
        global counted
        counted += 1
        return torch.tanh(X @ w.T).pow(2).mean() / counted

    return loss, {"w": W.clone().requires_grad_()}


def noisy(draw: Callable[[], float], seed: Callable[[int], Any]) -> Any:
    seed(0)
    return (
        lambda p, step: torch.tanh(draw() * X @ p["w"].T).pow(2).mean(),
        {"w": W.clone().requires_grad_()},
    )


class Itself:
    """A loss with a state of its own."""

    def __init__(self) -> None:
        self.level = torch.ones((), dtype=F64)

    def __call__(self, p: dict[str, Tensor], step: int) -> Tensor:
        value = torch.tanh(X @ p["w"].T).pow(2).mean() / self.level
        self.level = self.level + 0.5
        return value


COUNTERS: dict[str, Callable[[], tuple[Loss, dict[str, Tensor]]]] = {
    "module": lambda: of_module(Annealed()),
    "dict of a module": lambda: of_module(Listed()),
    "variable": counting,
    "global variable": counting_globally,
    "random": lambda: noisy(random.random, random.seed),
    "numpy": lambda: noisy(np.random.rand, np.random.seed),
    "callable": lambda: (Itself(), {"w": W.clone().requires_grad_()}),
    "method": lambda: (Itself().__call__, {"w": W.clone().requires_grad_()}),
}


def outer_loss(params: Any) -> Tensor:
    return sum((p.sin().sum() for p in params), torch.zeros((), dtype=F64))


def gradient_of(problem: Any, gradient: Any) -> dict[str, Tensor]:
    loss, params = problem()
    end = unroll(loss, params, sgd(0.3), 3, gradient=gradient)
    grads = torch.autograd.grad(outer_loss(end.params.values()), list(params.values()))
    return dict(zip(params, grads, strict=True))


def assert_slope(grads: dict[str, Tensor], outer: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """The gradient's slope along a random direction is that of central differences of `outer`."""
    generator = torch.Generator().manual_seed(2)
    along = {n: torch.randn(g.shape, dtype=F64, generator=generator) for n, g in grads.items()}
    with torch.no_grad():
        ahead, behind = (outer({n: h * a for n, a in along.items()}) for h in (1e-5, -1e-5))
    slope = sum((g * along[n]).sum() for n, g in grads.items())
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gradient", ["reverse", *EXACT], ids=str)
@pytest.mark.parametrize("name", [*COUNTERS])
def test_a_loss_that_counts_has_the_right_derivative(name: str, gradient: Any) -> None:
    def outer(moves: dict[str, Tensor]) -> Tensor:
        loss, params = COUNTERS[name]()
        start = {n: p.detach() + moves[n] for n, p in params.items()}
        return outer_loss(unroll(loss, start, sgd(0.3), 3).params.values())

    assert_slope(gradient_of(COUNTERS[name], gradient), outer)


def trajectory(make: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    """The buffers after each evaluation of the unroll by "reverse"."""
    model = make()
    buffers: list[dict[str, Tensor]] = []
    hook: Any = lambda *_: buffers.append({n: b.clone() for n, b in model.named_buffers()})  # noqa: E731
    model.register_forward_hook(hook)
    loss, params = of_module(model)
    with torch.no_grad():
        unroll(loss, params, sgd(0.3), 3)
    return buffers


def along_trajectory(make: Callable[[], nn.Module]) -> Callable[[dict[str, Tensor]], Tensor]:
    """The outer loss with buffers that are constants: the derivative stops at them."""
    model, buffers = make().eval(), trajectory(make)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}

    def outer(moves: dict[str, Tensor]) -> Tensor:
        def loss(p: dict[str, Tensor], step: int) -> Tensor:
            return functional_call(model, {**p, **buffers[step]}, (X,)).cos().mean()

        moved = {n: p + moves[n] for n, p in start.items()}
        return outer_loss(unroll(loss, moved, sgd(0.3), 3).params.values())

    return outer


@pytest.mark.parametrize("gradient", ["reverse", *EXACT], ids=str)
@pytest.mark.parametrize("name", BUFFERS)
def test_a_loss_that_keeps_buffers_has_the_right_derivative(name: str, gradient: Any) -> None:
    make = MODULES[name]
    grads = gradient_of(lambda: of_module(make()), gradient)
    assert_slope(grads, along_trajectory(make))


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_each_mode_leaves_the_surroundings_of_reverse(name: str, gradient: Any) -> None:
    states = []
    for mode in ("reverse", gradient):
        model = MODULES[name]()
        loss, params = of_module(model)
        end = unroll(loss, params, sgd(0.3), 3, gradient=mode)
        outer_loss(end.params.values()).backward()
        kept = {k: v for k, v in vars(model).items() if isinstance(v, int | float)}
        states.append((kept, {n: b.clone() for n, b in model.named_buffers()}, end.losses))
    exact = gradient != "implicit"  # whose steps are those of another loss
    assert states[0][0] == states[1][0]
    if exact:
        torch.testing.assert_close(states[0][1:], states[1][1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", EXACT, ids=str)
@pytest.mark.parametrize("name", ["running buffer", "within another", "counter"])
def test_mapped_tasks_find_what_reverse_finds(name: str, gradient: Any) -> None:
    def run(mode: Any) -> Any:
        model = MODULES[name]()

        def task_loss(meta: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            def loss(p: dict[str, Tensor], step: int, x: Tensor) -> Tensor:
                return functional_call(model, p, (x,)).cos().mean()

            end = unroll(loss, dict(meta), sgd(0.3), 3, context=x, gradient=mode)
            return outer_loss(end.params.values()), end.losses

        start = {n: p.detach() for n, p in model.named_parameters()}
        return meta_gradient(task_loss, start, torch.stack([X, X.sin()]), "vmap")

    torch.testing.assert_close(run(gradient), run("reverse"), rtol=1e-10, atol=1e-12)


def test_recorded_steps_are_not_recorded_where_they_change_something() -> None:
    def run(gradient: Any, wrap: Any) -> Any:
        model = spectral(parametrizations.spectral_norm)
        params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
        loss = wrap(lambda p, x: functional_call(model, p, (x,)).cos().mean())
        end = unroll(loss, params, sgd(0.3), 3, context=X, gradient=gradient)
        return torch.autograd.grad(outer_loss(end.params.values()), list(params.values()))

    ours = run("checkpoint", lambda loss: RecordedLoss(loss, recorded))
    exact = run("reverse", lambda loss: lambda p, step, x: loss(p, x))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", EXACT, ids=str)
def test_blocks_that_change_something_are_right_too(gradient: Any) -> None:
    def run(mode: Any) -> Any:
        model = spectral(parametrizations.spectral_norm)
        params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
        loss = BlockLoss(model, lambda x: x, lambda out, x: out.cos().mean())
        end = unroll(loss, params, sgd(0.3), 3, context=X, gradient=mode)
        return torch.autograd.grad(outer_loss(end.params.values()), list(params.values()))

    torch.testing.assert_close(run(gradient), run("reverse"), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
def test_what_is_kept_with_its_gradient_is_refused(gradient: Any) -> None:
    loss, params = of_module(Running(keeps=lambda x: x))
    with pytest.raises(UnsuitableModel, match=r"keeps scale .*gradient='reverse'.*detach"):
        unroll(loss, params, sgd(0.3), 3, gradient=gradient)


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
def test_a_state_that_cannot_be_seen_is_found_by_its_effect(gradient: Any) -> None:
    calls = [1]

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        calls.append(1)
        return p["w"].pow(2).sum() / len(calls)

    with pytest.raises(UnsuitableModel, match=r"gives another value.*gradient='reverse'"):
        unroll(loss, {"w": W.clone().requires_grad_()}, sgd(0.1), 2, gradient=gradient)


def numbers() -> Iterator[float]:
    for number in (1.0, 1.0, 3.0, *range(3, 99)):
        yield float(number)


class Loader:
    """An iterator that counts, as that of a `DataLoader` does."""

    def __init__(self) -> None:
        self.given = 0

    def __next__(self) -> float:
        self.given += 1
        return 1.0 + self.given // 3


ITERATORS: dict[str, Callable[[], Any]] = {
    "list": lambda: iter([1.0, 1.0, *[3.0] * 99]),
    "range": lambda: iter(range(1, 99)),
    "count": lambda: itertools.count(1),
    "map": lambda: map(float, [1.0, 1.0, *[3.0] * 99]),
    "zip": lambda: zip([1.0, 1.0, *[3.0] * 99], strict=True),
    "generator": numbers,
    "object": Loader,
    "data loader": lambda: iter(torch.utils.data.DataLoader([1.0, 1.0, *[3.0] * 9])),
}


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
@pytest.mark.parametrize("name", ITERATORS)
def test_an_iterator_cannot_give_the_same_again(name: str, gradient: Any) -> None:
    """Also where its first items are equal, or a counter beside it can be put back."""
    module = Counting()
    module.items = ITERATORS[name]()

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        taken = next(module.items)
        module.calls += 1
        return p["w"].pow(2).sum() * torch.as_tensor(taken).sum()

    with pytest.raises(UnsuitableModel, match=r"next item of .*items, an iterator.*context"):
        unroll(loss, {"w": W.clone().requires_grad_()}, sgd(0.1), 3, gradient=gradient)
    with torch.no_grad():  # nothing is evaluated again
        if gradient != "implicit":
            unroll(loss, {"w": W}, sgd(0.1), 3, gradient=gradient)


class Counting:
    calls = 0
    items: Any = None


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
def test_a_counter_does_not_hide_another_state(gradient: Any) -> None:
    seen, calls = [1], 0

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        nonlocal calls
        calls += 1
        seen.append(1)
        return p["w"].pow(2).sum() / len(seen)

    with pytest.raises(UnsuitableModel, match="gives another value"):
        unroll(loss, {"w": W.clone().requires_grad_()}, sgd(0.1), 2, gradient=gradient)


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
def test_functions_of_one_code_are_tried_each(gradient: Any) -> None:
    """A wrapper, and a factory, make losses that differ by what they close over alone."""

    def made(seen: Any) -> Callable[..., Tensor]:
        def loss(p: dict[str, Tensor], step: int) -> Tensor:
            if isinstance(seen, list):
                seen.append(1)
                return p["w"].pow(2).sum() / len(seen)
            return p["w"].pow(2).sum() * seen

        return loss

    def wrapped(seen: Any) -> None:
        own = made(seen)
        params = {"w": W.clone().requires_grad_()}
        unroll(lambda p, step: own(p, step), params, sgd(0.1), 2, gradient=gradient)

    wrapped(1.0)
    with pytest.raises(UnsuitableModel, match="gives another value"):
        wrapped([1])


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("gradient", ["checkpoint", "mixed", Checkpoint(2)], ids=str)
def test_what_is_recomputed_is_compared_with_the_first_time(gradient: Any, batching: Any) -> None:
    """Random numbers of one's own that come in at a later step than the one that is looked at."""
    generator = torch.Generator().manual_seed(0)

    def loss(p: dict[str, Tensor], step: int, x: Tensor) -> Tensor:
        noise = torch.randn((), generator=generator, dtype=F64) if step == 1 else 1.0
        return (p["w"] * x).pow(2).sum() * noise

    def task_loss(meta: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        end = unroll(loss, dict(meta), sgd(0.1), 3, context=x, gradient=gradient)
        return end.params["w"].sum(), end.losses

    with pytest.raises(UnsuitableModel, match="gives another value"):
        meta_gradient(task_loss, {"w": W}, torch.ones(2, 1, dtype=F64), batching)


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
def test_a_tensor_that_is_written_and_no_buffer_is_refused(gradient: Any) -> None:
    scratch = torch.zeros(2, dtype=F64)

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        with torch.no_grad():
            torch.add(scratch, 1.0, out=scratch)
        return (p["w"].sum(1) * scratch).pow(2).sum()

    with pytest.raises(UnsuitableModel, match=r"writes on a tensor of shape \(2,\)"):
        unroll(loss, {"w": W.clone().requires_grad_()}, sgd(0.1), 2, gradient=gradient)


@pytest.mark.parametrize("gradient", OTHERS, ids=str)
def test_what_is_kept_and_never_read_is_harmless(gradient: Any) -> None:
    class Plotted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(W.clone())
            self.shown: Any = None
            self.log: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.shown = torch.tanh(x @ self.weight.T)
            self.log.append(1.0)
            return self.shown

    loss, params = of_module(Plotted())
    end = unroll(loss, params, sgd(0.3), 3, gradient=gradient)
    outer_loss(end.params.values()).backward()


# ---------------------------------------------------------------- the drop-in


@pytest.mark.parametrize("name", MODULES)
def test_the_drop_in_differentiates_a_module_that_changes(name: str) -> None:
    model = MODULES[name]()
    opt = torch.optim.SGD(model.parameters(), 0.3)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(X).cos().mean())
        named = dict(model.named_parameters())
        found = torch.autograd.grad(outer_loss(fmodel.parameters()), list(named.values()))
    exact = gradient_of(lambda: of_module(MODULES[name]()), "reverse")
    torch.testing.assert_close(dict(zip(named, found, strict=True)), exact, rtol=1e-11, atol=1e-12)
