"""MAML++ against a loop written out, and first-order meta-steps before those of second order."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError
from metarun.training.loop import meta_step
from metarun.training.setup import Setup
from metarun.training.state import fresh
from tests.setups import IMAGES, SINE, config_of, setup_of, stirred, task_of

THREE = ("algo.inner_steps=3", "algo.eval_inner_steps=4")
Meta = dict[str, Tensor]


def by_hand(meta: Meta, task: Any, steps: int) -> list[Tensor]:
    """Query losses before each of some inner steps and after the last one."""
    fast = {n: v for n, v in meta.items() if ".norm." not in n and not n.startswith("inner_opt.")}

    def output(w: Meta, step: int, x: Tensor) -> Tensor:
        own = min(max(step, 0), 2)
        for i in range(4):
            name = f"body.{i}"
            x = F.conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2, padding=1)
            gain, shift = (meta[f"{name}.norm.{part}"][own] for part in ("weight", "bias"))
            x = F.relu(F.batch_norm(x, None, None, gain, shift, training=True))
        return F.linear(x.mean(dim=(-2, -1)), w["head.weight"], w["head.bias"])

    found = []
    for step in range(steps + 1):
        found.append(F.cross_entropy(output(fast, step - 1, task.query_x), task.query_y))
        inner = F.cross_entropy(output(fast, step, task.support_x), task.support_y)
        grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
        rates = [meta[f"inner_opt.lr/{name}"][min(step, 2)] for name in fast]
        fast = {
            name: value - rate * grad
            for (name, value), rate, grad in zip(fast.items(), rates, grads, strict=True)
        }
    return found


@pytest.mark.parametrize(("done", "weights"), [(0, (1 / 3, 1 / 3, 1 / 3)), (30, (0, 0, 1))])
def test_it_learns_losses_rates_and_normalisation_of_each_step(
    done: int, weights: tuple[float, ...]
) -> None:
    setup = setup_of(*IMAGES, "algo=maml_pp", *THREE, "algo.multi_step_loss=30")
    meta, task = stirred(setup), task_of(setup)
    step = torch.tensor(done, dtype=torch.float64)
    loss = setup.algorithm.loss(meta, task, step)[0]
    losses = by_hand(meta, task, 3)
    expected = torch.stack([w * x for w, x in zip(weights, losses[1:], strict=True)]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    ours, theirs = (torch.autograd.grad(v, list(meta.values())) for v in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    assert any(n.startswith("inner_opt.lr/body") and v.shape == (3,) for n, v in meta.items())
    trace = setup.algorithm.trace(meta, task).query_loss
    torch.testing.assert_close(
        trace, torch.stack(by_hand(meta, task, 4)).detach(), rtol=1e-9, atol=0
    )


def test_what_it_sets_in_other_groups_can_be_set_otherwise() -> None:
    usual = config_of("algo=maml_pp")
    assert (usual.inner_opt.learn, usual.inner_opt.granularity) == (["lr"], "parameter_step")
    assert (usual.outer_opt.schedule, usual.outer_opt.min_lr) == ("cosine", 1e-5)
    own = config_of("algo=maml_pp", "inner_opt.learn=[]", "outer_opt.schedule=constant")
    assert (own.inner_opt.learn, own.outer_opt.schedule) == ([], "constant")
    assert config_of("algo=maml").inner_opt.learn == []


def test_a_network_without_normalisation_has_none_by_step() -> None:
    meta = setup_of(*SINE, "algo=maml_pp").algorithm.init()
    assert all(v.shape == (5,) for n, v in meta.items() if n.startswith("inner_opt."))
    with pytest.raises(ConfigError, match=r"no parameter matches 'nothing\.\*'"):
        setup_of(*SINE, "algo=maml_pp", "algo.per_step=[nothing.*]")


# ---------------------------------------------------------------- derivative-order annealing

ANNEALED = ("algo.inner_steps=2", "inner_opt.learn=[lr]")


def at_step(setup: Setup, step: int) -> Meta:
    return setup.gradient(stirred(setup), setup.train_tasks.sample(0, 2), step)[0]


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint"])
@pytest.mark.parametrize("inner_opt", ["sgd", "adam", "rmsprop"])
def test_the_gradient_is_of_first_order_first(gradient: str, inner_opt: str) -> None:
    how = (*SINE, *ANNEALED, f"inner_opt={inner_opt}")
    changing = setup_of(*how, "algo.first_order_until=3", f"engine.gradient={gradient}")
    first, second = (at_step(setup_of(*how, f"algo.order={k}"), 0) for k in (1, 2))
    assert not torch.allclose(first["head.weight"], second["head.weight"])
    for step, expected in ((0, first), (2, first), (3, second), (9, second)):
        torch.testing.assert_close(at_step(changing, step), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("more", [(), ("algo.multi_step_loss=6",)])
def test_a_recording_changes_its_order(batching: str, more: tuple[str, ...]) -> None:
    """A count in Python would stand still in it."""
    ends = []
    for how in ("none", "replay"):
        setup = setup_of(
            *SINE, *ANNEALED, "algo.first_order_until=4", *more, f"engine.compile={how}",
            f"engine.batching={batching}",
        )  # fmt: skip
        state = fresh(setup)
        for _ in range(6):
            meta_step(setup, state)
        ends.append({n: v.detach() for n, v in state.meta.items()})
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_values_are_those_of_second_order_to_the_bit() -> None:
    one, other = (setup_of(*SINE, *ANNEALED, *more) for more in ((), ("algo.first_order_until=3",)))
    meta, task = stirred(one), task_of(one)
    step = torch.zeros((), dtype=torch.float64)
    assert torch.equal(one.algorithm.loss(meta, task)[0], other.algorithm.loss(meta, task, step)[0])
    traces = (setup.algorithm.trace(meta, task) for setup in (one, other))
    assert torch.equal(*(trace.query_loss for trace in traces))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["algo.order=1"], "is first order throughout"),
        (["algo.inner_steps=0"], r"algo\.first_order_until needs inner steps"),
        (["engine.gradient=implicit"], "changes from first to second order"),
        (["engine.gradient=mixed"], "changes from first to second order"),
        (["engine.gradient=truncated"], "changes from first to second order"),
        (["inner_opt=newton", "algo.adapt=[head.*]"], "driven by the gradient alone, such as sgd"),
        (["algo.first_order_until=-1"], "must be 0 or more"),
    ],
)
def test_what_cannot_change_its_order_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*SINE, "algo.first_order_until=5", *settings)
