"""Recorded inner steps: the bits of those that are not, from as many programs for any length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.unroll import (
    Checkpoint,
    InnerOptimizer,
    RecordedLoss,
    RecordingError,
    adam,
    newton,
    recorded,
    sgd,
    unrecorded,
    unroll,
)

F64 = torch.float64
Given = tuple[Tensor, Tensor]


def problem() -> tuple[dict[str, Tensor], Given]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (4, 3), "b": (3,), "v": (3, 1)}
    params = {
        name: torch.randn(shape, dtype=F64, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }
    x = torch.randn(6, 4, dtype=F64, generator=generator).requires_grad_()
    return params, (x, torch.randn(6, 1, dtype=F64, generator=generator))


def loss(params: dict[str, Tensor], given: Given) -> Tensor:
    x, y = given
    hidden = torch.tanh(x @ params["w"] + params["b"])
    return (hidden @ params["v"] - y).pow(2).mean()


def outcome(
    inner: RecordedLoss,
    optimizer: InnerOptimizer,
    gradient: Any = "checkpoint",
    steps: int = 4,
    learned: bool = True,
) -> list[Tensor]:
    """The query loss after an unroll, and its gradients."""
    params, given = problem()
    lr = torch.tensor(0.05, dtype=F64, requires_grad=True)
    hyper = {**optimizer.hyper, "lr": lr} if learned else None
    end = unroll(inner, params, optimizer, steps, context=given, hyper=hyper, gradient=gradient)
    value = loss(end.params, problem()[1]) + end.losses.sum()
    wanted = [*params.values(), given[0], *([lr] if learned else [])]
    return [value, *torch.autograd.grad(value, wanted)]


@pytest.mark.parametrize("optimizer", [sgd(0.05, momentum=0.9), adam(0.05)], ids=["sgd", "adam"])
def test_recorded_steps_have_the_bits_of_others(optimizer: InnerOptimizer) -> None:
    ours = outcome(RecordedLoss(loss, recorded), optimizer)
    plain = outcome(RecordedLoss(loss, unrecorded), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    exact = outcome(RecordedLoss(loss, recorded), optimizer, "reverse")
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_compiled_steps_are_the_same_up_to_rounding() -> None:
    ours = outcome(RecordedLoss(loss, lambda fn: recorded(fn, "inductor")), sgd(0.05))
    exact = outcome(RecordedLoss(loss, unrecorded), sgd(0.05), "reverse")
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


def test_the_loss_is_hardly_called_more_often_in_a_longer_unroll() -> None:
    """Once for each program and twice for `check_closure`, which looks at the end steps.

    That looks once more when it meets the loss.

    Each of the two programs is compared at its 1st, 2nd, 4th, 8th, 16th and 32nd replay.
    """
    calls: list[Given] = []

    def counted(params: dict[str, Tensor], given: Given) -> Tensor:
        calls.append(given)
        return loss(params, given)

    inner, seen = RecordedLoss(counted, recorded), []
    for steps in (3, 30):
        calls.clear()
        outcome(inner, sgd(0.01), steps=steps, learned=False)
        seen.append(len(calls))
    assert seen == [1 + 2 + 2 + 2 * 2, 2 + 2 * 4]


def test_each_choice_of_what_needs_a_gradient_has_its_own_pullback() -> None:
    inner = RecordedLoss(loss, recorded)
    for constant in (False, True, False):
        params, (x, y) = problem()
        given = (x.detach() if constant else x, y)
        end = unroll(inner, params, sgd(0.05), 2, context=given, gradient="checkpoint")
        wanted = [*params.values(), *([] if constant else [x])]
        ours = torch.autograd.grad(loss(end.params, given), wanted)
        end = unroll(inner, params, sgd(0.05), 2, context=given)
        exact = torch.autograd.grad(loss(end.params, given), wanted)
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_a_third_derivative_is_that_of_the_loss_itself() -> None:
    found = []
    for record, gradient in ((recorded, "checkpoint"), (unrecorded, "reverse")):
        params, given = problem()
        inner = RecordedLoss(loss, record)
        end = unroll(inner, params, sgd(0.05), 2, context=given, gradient=gradient)
        value = loss(end.params, given)
        first = torch.autograd.grad(value, list(params.values()), create_graph=True)
        norm = sum((g.pow(2).sum() for g in first), value.new_zeros(()))
        found.append(torch.autograd.grad(norm, [*params.values(), given[0]]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_transforms_of_torch_func_see_through_it() -> None:
    params, (x, y) = problem()

    def adapted(record: Any, gradient: Any) -> Callable[[Any, Tensor], Tensor]:
        inner = RecordedLoss(loss, record)

        def value(params: Any, x: Tensor) -> Tensor:
            end = unroll(inner, params, sgd(0.05), 2, context=(x, y), gradient=gradient)
            return loss(end.params, (x, y))

        return value

    xs = torch.stack([x.detach(), x.detach() + 1])
    fixed = {name: value.detach() for name, value in params.items()}
    ours, exact = (
        torch.func.vmap(torch.func.grad(adapted(*way)), in_dims=(None, 0))(fixed, xs)
        for way in ((recorded, "checkpoint"), (unrecorded, "reverse"))
    )
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["reverse", Checkpoint(2), "mixed", "implicit"], ids=str)
def test_other_modes_take_the_loss_as_it_is(gradient: Any) -> None:
    def refused(fn: Any) -> Any:
        def program(*args: Any) -> None:
            raise AssertionError("this mode records nothing")

        return program

    found = [
        outcome(RecordedLoss(loss, record), sgd(0.05), gradient, learned=False)
        for record in (refused, unrecorded)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_optimizer_that_takes_the_loss_gets_it() -> None:
    params, given = problem()
    head = {"v": params["v"]}
    fixed = {name: value for name, value in params.items() if name != "v"}

    def whole(head: dict[str, Tensor], given: Any) -> Tensor:
        fixed, rest = given
        return loss({**fixed, **head}, rest)

    inner = RecordedLoss(whole, recorded)
    ends = [
        unroll(inner, head, newton(), 2, context=(fixed, given), gradient=gradient)  # type: ignore[arg-type]
        for gradient in ("checkpoint", "reverse")
    ]
    grads = [torch.autograd.grad(loss({**fixed, **e.params}, given), params["w"]) for e in ends]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


def test_what_is_no_tensor_in_the_context_is_not_recorded() -> None:
    def powered(params: dict[str, Tensor], given: tuple[Given, int]) -> Tensor:
        return loss(params, given[0]).pow(given[1])

    found = []
    for gradient in ("checkpoint", "reverse"):
        params, given = problem()
        inner = RecordedLoss(powered, recorded)
        for power in (2, 3):
            end = unroll(inner, params, sgd(0.05), 2, context=(given, power), gradient=gradient)  # type: ignore[arg-type]
            value = loss(end.params, given)
            found.append(torch.autograd.grad(value, list(params.values())))
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-12, atol=1e-12)


def test_a_loss_that_cannot_be_recorded_says_so() -> None:
    def noisy(params: dict[str, Tensor], given: Given) -> Tensor:
        return loss(params, given) + torch.rand((), dtype=F64)

    with pytest.raises(RecordingError, match="random"):
        outcome(RecordedLoss(noisy, recorded), sgd(0.05))
