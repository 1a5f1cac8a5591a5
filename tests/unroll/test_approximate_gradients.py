"""Truncated, implicit and evolution gradients against what they should be."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from metarun.unroll import Evolution, Implicit, Truncated, meta_gradient, sgd, unroll
from metarun.unroll.gradients.implicit import conjugate_gradients

F64 = torch.float64


def loss_fn(params: dict[str, Tensor], step: int, context: Tensor) -> Tensor:
    w = params["w"]
    return (torch.sin(w * context) + 0.5 * w * w).sum() + 0.1 * (step + 1) * (w.sum() - 1) ** 2


def start() -> tuple[Tensor, Tensor, Tensor]:
    w = torch.tensor([0.4, -1.0, 0.3], dtype=F64, requires_grad=True)
    context = torch.tensor([1.2, 0.7, -0.4], dtype=F64, requires_grad=True)
    return w, context, torch.tensor(0.1, dtype=F64, requires_grad=True)


def gradients(gradient: Any, steps: int = 6, momentum: float = 0.5) -> tuple[Tensor, ...]:
    """With respect to the initial parameters, the context and the learning rate."""
    w, context, lr = start()
    optimizer = sgd(lr, momentum=momentum)
    end = unroll(loss_fn, {"w": w}, optimizer, steps, context=context, gradient=gradient)
    return torch.autograd.grad(end.params["w"].pow(3).sum(), (w, context, lr))


# ---------------------------------------------------------------- truncated


def test_truncation_beyond_the_first_step_is_exact() -> None:
    for last in (6, 100):
        for ours, exact in zip(gradients(Truncated(last)), gradients("reverse"), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)


def test_truncation_to_no_step_is_first_order_for_the_initial_parameters() -> None:
    w, context, lr = start()
    end = unroll(loss_fn, {"w": w}, sgd(lr), 6, context=context, gradient=Truncated(0))
    ours = torch.autograd.grad(
        end.params["w"].pow(3).sum(), (w, context, lr), materialize_grads=True
    )
    first = unroll(loss_fn, {"w": w}, sgd(lr), 6, context=context, gradient="first_order")
    assert torch.equal(ours[0], torch.autograd.grad(first.params["w"].pow(3).sum(), w)[0])
    assert not ours[1].any() and not ours[2].any()


def test_truncation_is_the_derivative_of_the_last_steps() -> None:
    """An oracle: take the first steps apart, then differentiate the rest from where they end."""
    w, context, lr = start()
    optimizer = sgd(lr, momentum=0.5)
    with torch.no_grad():
        early = unroll(loss_fn, {"w": w}, optimizer, 4, context=context)
    middle = early.params["w"].clone().requires_grad_()
    late = unroll(
        lambda p, step, c: loss_fn(p, step + 4, c),
        {"w": middle},
        optimizer,
        2,
        context=context,
        state=early.state,
    )
    expected = torch.autograd.grad(late.params["w"].pow(3).sum(), (middle, context, lr))
    for ours, exact in zip(gradients(Truncated(2)), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)


def test_truncation_keeps_the_path_and_no_graph_of_the_early_steps() -> None:
    w, context, lr = start()
    nodes = []
    for steps in (5, 50):
        ours, exact = (
            unroll(
                loss_fn,
                {"w": w},
                sgd(lr),
                steps,
                context=context,
                gradient=mode,
                observe=lambda p: p["w"].detach(),
            )
            for mode in (Truncated(3), "reverse")
        )
        assert torch.equal(ours.params["w"], exact.params["w"])
        assert torch.equal(ours.losses, exact.losses)
        assert torch.equal(torch.stack(ours.observed), torch.stack(exact.observed))
        nodes.append(count_nodes(ours.params["w"].sum()))
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("last", [0, 1, 3, 6])
def test_what_is_observed_from_the_cut_of_a_truncation_on_has_its_derivatives(last: int) -> None:
    """At the cut that of the initial parameters, later that of the steps since; none before."""
    w, context, lr = start()
    optimizer, steps = sgd(lr, momentum=0.5), 6
    cut = steps - last
    ours = unroll(
        loss_fn,
        {"w": w},
        optimizer,
        steps,
        context=context,
        gradient=Truncated(last),
        observe=lambda p: p["w"].pow(3).sum(),
    )
    with torch.no_grad():
        early = unroll(loss_fn, {"w": w}, optimizer, cut, context=context)
    middle = early.params["w"].clone().requires_grad_() if cut else w
    late = unroll(
        lambda p, step, c: loss_fn(p, step + cut, c),
        {"w": middle},
        optimizer,
        last,
        context=context,
        state=early.state,
        observe=lambda p: p["w"].pow(3).sum(),
    )
    assert len(ours.observed) == steps + 1
    assert not any(value.requires_grad for value in ours.observed[:cut])
    for seen, exact in zip(ours.observed[cut:], late.observed, strict=True):
        torch.testing.assert_close(seen, exact, rtol=1e-13, atol=0)
        pairs = zip(
            torch.autograd.grad(seen, (w, context, lr), retain_graph=True, materialize_grads=True),
            torch.autograd.grad(
                exact, (middle, context, lr), retain_graph=True, materialize_grads=True
            ),
            strict=True,
        )
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def count_nodes(value: Tensor) -> int:
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


# ---------------------------------------------------------------- implicit

MATRIX = torch.tensor([[3.0, 0.5, 0.2], [0.5, 2.0, -0.3], [0.2, -0.3, 1.0]], dtype=F64)


def quadratic(params: dict[str, Tensor], step: int, target: Tensor) -> Tensor:
    apart = params["w"] - target
    return 0.5 * apart @ MATRIX @ apart


@pytest.mark.parametrize(
    "mode",
    [
        Implicit(2.0, "cg", solver_steps=3),
        Implicit(2.0, "cg", solver_steps=20),
        Implicit(2.0, "neumann", solver_steps=300, solver_lr=0.2),
        Implicit(2.0, "fixed_point", solver_steps=300, solver_lr=0.2),
    ],
    ids=str,
)
def test_implicit_gradients_of_a_quadratic_are_those_of_its_solution(mode: Implicit) -> None:
    w, target, _ = start()
    end = unroll(quadratic, {"w": w}, sgd(0.2), 300, context=target, gradient=mode)
    solution = torch.linalg.solve(MATRIX + 2 * torch.eye(3), MATRIX @ target + 2 * w)
    torch.testing.assert_close(end.params["w"], solution, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(end.params["w"].pow(3).sum(), (w, target))
    exact = torch.autograd.grad(solution.pow(3).sum(), (w, target))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def implicit_and_unrolled(steps: int) -> float:
    """The relative difference to backpropagation through the proximal unroll itself."""
    results = []
    for mode in (Implicit(2.0, solver_steps=3), "reverse"):
        w, context, _ = start()

        def proximal(params: Any, step: int, given: Any) -> Tensor:
            context, w = given
            inner = loss_fn(params, 0, context)
            return inner + (params["w"] - w).pow(2).sum()

        if mode == "reverse":
            end = unroll(proximal, {"w": w}, sgd(0.1), steps, context=(context, w))
        else:
            end = unroll(
                lambda p, step, c: loss_fn(p, 0, c),
                {"w": w},
                sgd(0.1),
                steps,
                context=context,
                gradient=mode,
            )
        grads = torch.autograd.grad(end.params["w"].pow(3).sum(), (w, context))
        results.append(torch.cat(grads))
    return float((results[0] - results[1]).norm() / results[1].norm())


def test_implicit_gradients_approach_the_unrolled_ones_as_steps_grow() -> None:
    differences = [implicit_and_unrolled(steps) for steps in (2, 5, 10, 20, 40, 100)]
    assert all(b < a for a, b in itertools.pairwise(differences)), differences
    assert differences[0] > 0.05 and differences[-1] < 1e-8


def test_neumann_is_the_fixed_point_with_one_step_more() -> None:
    for steps in (1, 4, 9):
        fixed = Implicit(2.0, "fixed_point", steps + 1, 0.1)
        neumann = Implicit(2.0, "neumann", steps, 0.1)
        a, b = (implicit_gradients(mode) for mode in (fixed, neumann))
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def implicit_gradients(mode: Any) -> tuple[Tensor, ...]:
    w, context, _ = start()
    end = unroll(loss_fn, {"w": w}, sgd(0.1), 5, context=context, gradient=mode)
    return torch.autograd.grad(end.params["w"].pow(3).sum(), (w, context))


def test_conjugate_gradients_return_the_current_iterate_when_there_is_nothing_left() -> None:
    right = [torch.tensor([1.0, 2.0, 3.0], dtype=F64)]
    exact = torch.linalg.solve(MATRIX, right[0])
    for steps in (3, 4, 50):  # three are enough
        found = conjugate_gradients(lambda v: [MATRIX @ v[0]], right, steps)[0]
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    zero = conjugate_gradients(lambda v: [MATRIX @ v[0]], [torch.zeros(3, dtype=F64)], 4)[0]
    assert torch.equal(zero, torch.zeros(3, dtype=F64))
    downward = conjugate_gradients(lambda v: [-v[0]], right, 4)[0]
    assert torch.isfinite(downward).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_each_step_of_conjugate_gradients_is_the_best_of_its_krylov_space(steps: int) -> None:
    """By least squares over the span of b, A·b, A²·b …, one power a step."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, dtype=F64, generator=generator)
    matrix = factor @ factor.T + torch.eye(6, dtype=F64)
    right = torch.randn(6, dtype=F64, generator=generator)
    powers = [torch.linalg.matrix_power(matrix, k) @ right for k in range(steps)]
    basis = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ right)

    def system(v: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.split(matrix @ torch.cat(list(v)), [2, 4]))

    found = conjugate_gradients(system, torch.split(right, [2, 4]), steps)
    torch.testing.assert_close(torch.cat(list(found)), best, rtol=1e-8, atol=1e-10)


def test_implicit_gradients_are_the_same_under_vmap() -> None:
    meta = {"w": start()[0].detach()}
    targets = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))

    def task_loss(meta: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        end = unroll(
            loss_fn, dict(meta), sgd(0.1), 8, context=target, gradient=Implicit(solver_steps=2)
        )
        return end.params["w"].pow(3).sum(), end.losses

    loop, losses = meta_gradient(task_loss, meta, targets, "loop")
    mapped, same_losses = meta_gradient(task_loss, meta, targets, "vmap")
    torch.testing.assert_close(mapped["w"], loop["w"], rtol=1e-12, atol=0)
    torch.testing.assert_close(same_losses, losses, rtol=1e-12, atol=0)


def test_implicit_gradients_cannot_learn_the_inner_lr() -> None:
    w, context, lr = start()
    with pytest.raises(ValueError, match="do not learn them"):
        unroll(loss_fn, {"w": w}, sgd(lr), 2, context=context, gradient="implicit")


def test_the_proximal_term_counts_without_gradients_too() -> None:
    w, context, _ = start()
    far, near = (
        unroll(loss_fn, {"w": w}, sgd(0.05), 50, context=context, gradient=Implicit(proximal))
        for proximal in (0.01, 20.0)
    )
    with torch.no_grad():
        same = unroll(loss_fn, {"w": w}, sgd(0.05), 50, context=context, gradient=Implicit(20.0))
    assert (near.params["w"] - w).norm() < 0.5 * (far.params["w"] - w).norm()
    assert torch.equal(same.params["w"], near.params["w"])


# ---------------------------------------------------------------- evolution


def test_evolution_is_within_its_statistical_error() -> None:
    """With slope g and d inputs, the squared error of n samples has mean (d + 1) |g|² / n."""
    exact = torch.cat([g.reshape(-1) for g in gradients("reverse")])
    samples, ratios = 200, []
    for seed in range(6):
        torch.manual_seed(seed)
        mode = Evolution(samples=samples, sigma=1e-4)
        ours = torch.cat([g.reshape(-1) for g in gradients(mode)])
        ratios.append((ours - exact).pow(2).sum() / exact.pow(2).sum() * samples / (7 + 1))
    mean = torch.stack(ratios).mean()
    assert 0.4 < mean < 2.0, ratios


def test_evolution_takes_the_same_steps_and_sees_through_a_staircase() -> None:
    phi = torch.tensor(0.6, dtype=F64, requires_grad=True)

    def staircase(params: dict[str, Tensor], step: int, phi: Tensor) -> Tensor:
        return (params["w"] - torch.round(4 * phi) / 4).pow(2).sum()

    def derivative(mode: Any) -> Tensor:
        torch.manual_seed(0)
        end = unroll(
            staircase, {"w": torch.zeros(1, dtype=F64)}, sgd(0.5), 3, context=phi, gradient=mode
        )
        assert end.params["w"] == 0.5
        return torch.autograd.grad(end.params["w"].sum(), phi)[0]

    assert derivative("reverse") == 0
    # Smoothed over 0.3, the staircase of slope one on average has slope one.
    assert 0.8 < derivative(Evolution(samples=400, sigma=0.3)) < 1.2


def test_evolution_draws_for_each_task_of_a_vmap() -> None:
    w = torch.zeros(3, dtype=F64, requires_grad=True)

    def task(context: Tensor) -> Tensor:
        mode = Evolution(samples=2)
        end = unroll(loss_fn, {"w": w}, sgd(0.1), 2, context=context, gradient=mode)
        return end.params["w"].sum()

    contexts = torch.ones(4, 3, dtype=F64)
    torch.manual_seed(0)
    each = vmap(torch.func.grad(lambda w, c: task_of(w, c)), (None, 0), randomness="different")(
        w.detach(), contexts
    )
    assert torch.isfinite(each).all() and len({tuple(row.tolist()) for row in each}) == 4
    torch.autograd.grad(vmap(task, randomness="different")(contexts).sum(), w)


def task_of(w: Tensor, context: Tensor) -> Tensor:
    mode = Evolution(samples=2)
    end = unroll(loss_fn, {"w": w}, sgd(0.1), 2, context=context, gradient=mode)
    return end.params["w"].sum()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Truncated(-1), "0 or more"),
        (lambda: Implicit(solver="lu"), "choose one of cg, neumann, fixed_point"),
        (lambda: Implicit(proximal=0.0), "above 0"),
        (lambda: Evolution(samples=0), "1 or more"),
        (lambda: Evolution(sigma=0.0), "above 0"),
    ],
)
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_evolution_tries_other_points_at_each_call() -> None:
    w = torch.zeros(3, dtype=F64, requires_grad=True)
    torch.manual_seed(0)
    found = []
    for _ in range(4):
        end = unroll(
            loss_fn, {"w": w}, sgd(0.1), 2, context=torch.ones(3, dtype=F64), gradient=Evolution(1)
        )
        found.append(torch.autograd.grad(end.params["w"].sum(), w)[0])
    assert torch.linalg.matrix_rank(torch.stack(found)) == 3


def test_evolution_compares_under_the_same_dropout() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        return torch.nn.functional.dropout(params["w"], 0.5).pow(2).sum() / 2

    torch.manual_seed(3)
    end = unroll(loss, {"w": w}, sgd(0.2), 1, gradient=Evolution(samples=400, sigma=1e-3))
    slope = end.params["w"].detach()  # the map is linear: each end is its own slope, at one
    ours = torch.autograd.grad(end.params["w"].sum(), w)[0]
    torch.testing.assert_close(ours, slope, rtol=0, atol=0.25)


def test_implicit_gradients_have_second_derivatives() -> None:
    mode = Implicit(2.0, solver_steps=3)

    def slope(w: Tensor) -> Tensor:
        end = unroll(lambda p, s: p["w"].pow(4).sum(), {"w": w}, sgd(0.05), 400, gradient=mode)
        return torch.autograd.grad(end.params["w"].sum(), w, create_graph=True)[0]

    w = torch.tensor([1.0, 0.6], dtype=F64, requires_grad=True)
    (ours,) = torch.autograd.grad(slope(w).sum(), w)
    step = 1e-5
    by_differences = (slope(w + step) - slope(w - step)) / (2 * step)
    torch.testing.assert_close(ours, by_differences.detach(), rtol=1e-6, atol=1e-8)


def test_implicit_gradients_use_the_last_steps_loss() -> None:
    w, context, _ = start()
    end = unroll(loss_fn, {"w": w}, sgd(0.05), 4, context=context, gradient=Implicit(2.0))
    ours = torch.autograd.grad(end.params["w"].sum(), w)[0]
    point = end.params["w"].detach()
    hessian = torch.func.jacrev(torch.func.grad(lambda w: loss_fn({"w": w}, 3, context.detach())))(
        point
    )
    expected = 2 * torch.linalg.solve(hessian + 2 * torch.eye(3), torch.ones(3, dtype=F64))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_conjugate_gradients_do_not_follow_a_direction_of_negative_curvature() -> None:
    right = [torch.tensor([1.0, 1.0], dtype=F64)]
    found = conjugate_gradients(lambda v: [-v[0]], right, 4)[0]
    assert torch.equal(found, torch.zeros(2, dtype=F64))
