"""Schedules over inner steps: against torch's, their derivatives, and in an unroll."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, LRScheduler, StepLR

from metarun.unroll import (
    Schedule,
    adam,
    constant,
    cosine,
    exponential,
    learn_hyper,
    linear,
    scheduled,
    sgd,
    step_decay,
    unroll,
)
from tests.unroll.optim_cases import assert_same, loss_of, start, step_torch

PAIRS: dict[str, tuple[Schedule, Callable[[SGD], LRScheduler]]] = {
    "constant": (constant(0.4), lambda o: StepLR(o, 100)),
    "linear": (linear(0.4, 0.1, 6), lambda o: LinearLR(o, 1.0, 0.25, 6)),
    "cosine": (cosine(0.4, 0.01, 9), lambda o: CosineAnnealingLR(o, 9, eta_min=0.01)),
    "exponential": (exponential(0.4, 0.8), lambda o: ExponentialLR(o, 0.8)),
    "step": (step_decay(0.4, 0.5, 3), lambda o: StepLR(o, 3, 0.5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_steps_with_a_schedule_are_those_of_torch(name: str) -> None:
    schedule, in_torch = PAIRS[name]
    theirs = {name: p.requires_grad_() for name, p in start().items()}
    optimizer = SGD(theirs.values(), lr=0.4, momentum=0.5)
    scheduler = in_torch(optimizer)
    for step in range(9):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-14)
        step_torch(optimizer, theirs, 1)
        scheduler.step()
    ours = sgd(0.4, momentum=0.5)
    hyper = scheduled(ours.hyper, {"lr": schedule})
    assert_same(unroll(lambda p, s: loss_of(p), start(), ours, 9, hyper=hyper).params, theirs)


@pytest.mark.parametrize("schedule", [linear(0.4, 0.1, 5), cosine(0.4, 0.1, 5)])
def test_the_ends_are_reached_and_kept(schedule: Schedule) -> None:
    assert schedule(0) == 0.4
    assert [schedule(step) for step in (5, 6, 100)] == pytest.approx([0.1] * 3, rel=1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: linear(a, b, 2),
        lambda a, b: cosine(a, b, 3),
        lambda a, b: exponential(a, b),
        lambda a, b: step_decay(a, b, 2),
    ],
)
def test_schedules_are_differentiable_by_their_values(make: Callable[..., Schedule]) -> None:
    optimizer = adam(eps=1e-2)

    def after(a: Tensor, b: Tensor) -> Tensor:
        hyper = scheduled(optimizer.hyper, {"lr": make(a, b), "beta1": constant(b)})
        return loss_of(unroll(lambda p, s: loss_of(p), start(), optimizer, 4, hyper=hyper).params)

    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.6)]
    assert torch.autograd.gradcheck(after, values)
    assert all(g != 0 for g in torch.autograd.grad(after(*values), values))


def test_schedules_go_together_with_learned_hyperparameters() -> None:
    optimizer = sgd(0.1, momentum=0.5)
    learned = learn_hyper(optimizer.hyper, ["momentum"], "step", start(), steps=2)
    hyper = scheduled(lambda step: learned.at(learned.initial, step), {"lr": linear(0.2, 0.1, 1)})
    assert hyper(0)["lr"] == 0.2 and hyper(1)["lr"] == pytest.approx(0.1)
    assert hyper(1)["momentum"]["w"] == 0.5


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="no hyperparameter speed to schedule; there are: lr"):
        scheduled(sgd().hyper, {"speed": constant(1.0)})
    with pytest.raises(ValueError, match="no hyperparameter speed to schedule"):
        scheduled(lambda step: sgd().hyper, {"speed": constant(1.0)})(0)
    for make in (linear, cosine):
        with pytest.raises(ValueError, match="steps must be 1 or more, not 0"):
            make(1.0, 0.0, 0)
    with pytest.raises(ValueError, match="every must be 1 or more, not 0"):
        step_decay(1.0, 0.5, 0)
