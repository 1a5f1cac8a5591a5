"""Sharp-MAML against steps written out: gradients from uphill, in inner and outer steps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError
from metarun.training.loop import meta_step
from metarun.training.meta_gradient import uphill
from metarun.training.setup import Setup
from metarun.training.state import fresh
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

FAR = ("algo.inner_radius=0.3", "algo.outer_radius=0")  # far enough to matter
OF_EACH_STEP = (
    "algo.per_step=[body.0.bias]", "inner_opt.learn=[lr]", "inner_opt.granularity=step",
)  # fmt: skip
STEPS = ("algo.inner_steps=2", "algo.eval_inner_steps=4", "inner_opt.lr=0.05")
Meta = dict[str, Tensor]


def output(w: Meta, x: Tensor) -> Tensor:
    hidden = F.relu(F.linear(x, w["body.0.weight"], w["body.0.bias"]))
    return F.linear(hidden, w["head.weight"], w["head.bias"])


def by_hand(meta: Meta, task: Any, steps: int, order: int) -> list[Tensor]:
    """Where there are a bias and a rate of each step, steps beyond take the last ones."""
    w = {name: meta[name] for name in ("body.0.weight", "head.weight", "head.bias")}
    rates = meta.get("inner_opt.lr", torch.tensor([0.05], dtype=torch.float64))
    biases = meta["body.0.bias"]
    stacked, found = biases.dim() == 2, []
    if not stacked:
        w["body.0.bias"] = biases

    def loss(now: Meta, step: int, x: Tensor, y: Tensor) -> Tensor:
        own = {"body.0.bias": biases[min(max(step, 0), 1)]} if stacked else {}
        return F.mse_loss(output(now | own, x), y)

    for step in range(steps + 1):
        found.append(loss(w, step - 1, task.query_x, task.query_y))
        if step == steps:
            break
        place, grads = w, None
        for _ in range(2):  # here, then uphill of here
            inner = loss(place, step, task.support_x, task.support_y)
            grads = torch.autograd.grad(
                inner, list(place.values()), create_graph=order == 2, retain_graph=True
            )
            norm = torch.stack([g.norm() for g in grads]).norm()
            place = {n: p + 0.3 * g / norm for (n, p), g in zip(w.items(), grads, strict=True)}
        assert grads is not None
        rate = rates[min(step, len(rates) - 1)]
        w = {n: p - rate * g for (n, p), g in zip(w.items(), grads, strict=True)}
    return found


@pytest.mark.parametrize(
    ("order", "gradient"), [(1, "auto"), (2, "auto"), (2, "checkpoint"), (2, "mixed")]
)
def test_inner_steps_take_the_gradient_from_uphill(order: int, gradient: str) -> None:
    setup = setup_of(
        *SINE, "algo=sharp_maml", *FAR, *STEPS, f"algo.order={order}",
        f"engine.gradient={gradient}",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    loss, extra = setup.algorithm.loss(meta, task)
    expected = by_hand(meta, task, 2, order)[-1]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    both = (torch.autograd.grad(v, list(meta.values())) for v in (loss, expected))
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-10)
    first = F.mse_loss(output(meta, task.support_x), task.support_y)
    assert extra["inner_losses"].shape == (2,)
    torch.testing.assert_close(extra["inner_losses"][0], first)
    if gradient == "auto":
        trace = setup.algorithm.trace(meta, task).query_loss
        curve = torch.stack(by_hand(meta, task, 4, 1)).detach()
        torch.testing.assert_close(trace, curve, rtol=1e-9, atol=1e-11)


def one_step(setup: Setup) -> Meta:
    state = fresh(setup)
    meta_step(setup, state)
    return {name: value.detach() for name, value in state.meta.items()}


@pytest.mark.parametrize("compile_", ["none", "replay"])
def test_the_outer_step_takes_the_gradient_of_the_meta_batch_from_uphill(compile_: str) -> None:
    outer = ("outer_opt=sgd", "outer_opt.lr=0.1", f"engine.compile={compile_}")
    setup = setup_of(
        *SINE, "algo=sharp_maml", "algo.inner_radius=0", "algo.outer_radius=0.4", *STEPS, *outer
    )
    plain = setup_of(*SINE, "algo=maml", *STEPS, *outer)
    state, expected = fresh(setup), fresh(plain).meta
    for step in range(4):  # recorded by then
        tasks = plain.train_tasks.sample(2 * step, 2)

        def mean_loss(meta: Meta, tasks: Any = tasks) -> Tensor:
            losses = [
                plain.algorithm.loss(meta, type(tasks)(*(part[i] for part in tasks)))[0]
                for i in range(2)
            ]
            return torch.stack(losses).mean()

        here = torch.autograd.grad(mean_loss(expected), list(expected.values()))
        norm = torch.cat([g.flatten() for g in here]).norm()
        there = {n: p + 0.4 * g / norm for (n, p), g in zip(expected.items(), here, strict=True)}
        grads = torch.autograd.grad(mean_loss(there), list(there.values()))
        expected = {
            n: (p - 0.1 * g).detach().requires_grad_()
            for (n, p), g in zip(expected.items(), grads, strict=True)
        }
        meta_step(setup, state)
        torch.testing.assert_close(state.meta, expected, rtol=1e-8, atol=1e-10)


def test_without_a_radius_it_is_maml() -> None:
    tiny = ("algo.inner_radius=1e-13", "algo.outer_radius=1e-13")
    ends = [one_step(setup_of(*SINE, *STEPS, *a)) for a in (("algo=sharp_maml", *tiny), ())]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)
    default = one_step(setup_of(*SINE, *STEPS, "algo=sharp_maml", "algo.outer_radius=0.3"))
    assert not torch.allclose(default["head.weight"], ends[1]["head.weight"], atol=1e-6)


@pytest.mark.parametrize("inner_opt", ["adam", "asgd", "muon"])
def test_other_inner_optimizers_step_by_the_gradient_from_uphill(inner_opt: str) -> None:
    adapt = ("algo.adapt=['*.weight']",) if inner_opt == "muon" else ()
    setup = setup_of(*SINE, "algo=sharp_maml", *FAR, f"inner_opt={inner_opt}", *adapt)
    meta, tasks = stirred(setup), setup.train_tasks.sample(0, 2)
    grads, row = setup.gradient(meta, tasks)
    assert row.loss.isfinite() and all(g.isfinite().all() for g in grads.values())


def test_values_and_rates_of_each_step_are_those_of_whole_steps() -> None:
    setup = setup_of(*SINE, "algo=sharp_maml", *FAR, *STEPS, *OF_EACH_STEP)
    meta, task = stirred(setup), task_of(setup)
    assert meta["body.0.bias"].shape == (2, 6) and meta["inner_opt.lr"].shape == (2,)
    loss, expected = setup.algorithm.loss(meta, task)[0], by_hand(meta, task, 2, 2)[-1]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    both = (torch.autograd.grad(v, list(meta.values())) for v in (loss, expected))
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-10)
    trace = setup.algorithm.trace(meta, task).query_loss
    curve = torch.stack(by_hand(meta, task, 4, 1)).detach()
    torch.testing.assert_close(trace, curve, rtol=1e-9, atol=1e-11)


def test_it_goes_with_losses_of_each_step_and_another_order_first() -> None:
    more = (*OF_EACH_STEP, "algo.multi_step_loss=5")
    changing = setup_of(*SINE, "algo=sharp_maml", *FAR, *STEPS, *more, "algo.first_order_until=3")
    for step, order in ((2, 1), (3, 2)):
        plain = setup_of(*SINE, "algo=sharp_maml", *FAR, *STEPS, *more, f"algo.order={order}")
        meta, tasks = stirred(plain), plain.train_tasks.sample(0, 2)
        both = [each.gradient(meta, tasks, step)[0] for each in (changing, plain)]
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)


def test_the_last_steps_alone_are_whole_steps() -> None:
    found = []
    for mode in (("engine.gradient=truncated", "engine.last=2"), ("engine.gradient=reverse",)):
        setup = setup_of(*SINE, "algo=sharp_maml", *FAR, *STEPS, *mode)
        found.append(setup.gradient(stirred(setup), setup.train_tasks.sample(0, 2))[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_zero_gradient_goes_nowhere() -> None:
    meta = {"w": torch.ones(2, requires_grad=True), "kept": torch.ones(1)}
    moved = uphill(meta, {"w": torch.zeros(2), "kept": torch.ones(1)}, ("kept",), 0.5)
    assert torch.equal(moved["w"], meta["w"]) and moved["kept"] is meta["kept"]


def test_moving_averages_are_those_of_the_second_look() -> None:
    setup = setup_of(*IMAGES, "algo=sharp_maml", "backbone.norm=running", "algo.outer_radius=0.5")
    state = fresh(setup)
    meta_step(setup, state)
    assert all(state.meta[name].isfinite().all() for name in setup.algorithm.kept)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["algo.inner_radius=0", "algo.outer_radius=0"], "raise one, or choose algo=maml"),
        (["algo.inner_radius=-1"], "must be 0 or more"),
        (["algo.outer_radius=nan"], "must be a finite number"),
        (["engine.gradient=implicit"], "knows nothing of the path"),
        (["inner_opt=newton", "algo.adapt=[head.*]"], "driven by the gradient alone, such as sgd"),
        (["algo.inner_steps=0", "algo.eval_inner_steps=0"], "inner_radius needs inner steps"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*SINE, "algo=sharp_maml", *settings)
