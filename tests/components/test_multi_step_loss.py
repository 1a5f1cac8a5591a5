"""`algo.multi_step_loss`: the query loss after each inner step counts, by MAML++'s weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metarun.components.algo.descent import weights_by_step
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.training.loop import meta_step
from metarun.training.setup import Setup
from metarun.training.state import fresh, restore, snapshot
from metarun.unroll._torch import pytree
from tests import setups

NETWORK = (
    "data=glyphs", "backbone=mlp", "backbone.hidden=[6]", "task.way=3", "task.query=2",
    "trainer.meta_batch=2", "engine.precision=float64", "algo.inner_steps=3", "trainer.steps=20",
)  # fmt: skip


def setup_of(*settings: str) -> Setup:
    return setups.setup_of(*NETWORK, *settings)


def by_hand(step: int, inner_steps: int, until: int) -> list[float]:
    """The weights as the reference code computes them, with meta-steps for its epochs."""
    weights = [1.0 / inner_steps] * inner_steps
    decay = 1.0 / inner_steps / until
    least = 0.03 / inner_steps
    for i in range(inner_steps - 1):
        weights[i] = max(weights[i] - step * decay, least)
    most = 1.0 - (inner_steps - 1) * least
    weights[-1] = min(weights[-1] + step * (inner_steps - 1) * decay, most)
    return weights if step < until else [0.0] * (inner_steps - 1) + [1.0]


@pytest.mark.parametrize("inner_steps", [1, 2, 5])
def test_the_weights_are_those_of_the_reference_code(inner_steps: int) -> None:
    for step in range(12):
        ours = weights_by_step(inner_steps, 10, torch.tensor(float(step), dtype=torch.float64))
        assert ours.tolist() == pytest.approx(by_hand(step, inner_steps, 10), abs=1e-12)
        assert float(ours.sum()) == pytest.approx(1)


@pytest.mark.parametrize("gradient", ["reverse", "first_order", "checkpoint", "mixed"])
def test_the_gradient_is_the_weighted_sum_of_those_of_shorter_loops(gradient: str) -> None:
    """The loss after step i is that of a run with i inner steps."""
    how = (f"engine.gradient={gradient}", "engine.compile=none")
    setup = setup_of("algo.multi_step_loss=10", *how)
    meta = {n: v.requires_grad_() for n, v in fresh(setup).meta.items()}
    tasks = setup.train_tasks.sample(0, 2)
    for step in (0, 4, 9, 10, 15):
        grads, metrics = setup.gradient(meta, tasks, step)
        expected = {name: torch.zeros_like(value) for name, value in grads.items()}
        for i, weight in enumerate(by_hand(step, 3, 10)):
            short = setup_of(f"algo.inner_steps={i + 1}", *how)
            own, last = short.gradient(meta, tasks)
            expected = {name: value + weight * own[name] for name, value in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(grads[name], value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(metrics.loss, last.loss)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_a_recording_follows_the_meta_steps(batching: str) -> None:
    """A count in Python would stand still in it."""
    ends: list[Any] = []
    for compile_ in ("none", "replay"):
        setup = setup_of(
            "algo.multi_step_loss=6", f"engine.compile={compile_}", f"engine.batching={batching}"
        )
        state = fresh(setup)
        for _ in range(8):
            meta_step(setup, state)
        own = [float(m.own["weighted_loss"]) for m in state.recent]
        reported = [float(m.loss) for m in state.recent]
        assert all(a != b for a, b in zip(own[:6], reported[:6], strict=True))
        assert own[6:] == pytest.approx(reported[6:], abs=1e-12)
        ends.append([v.detach() for v in state.meta.values()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_it_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    setup = setup_of("algo.multi_step_loss=6")
    state = fresh(setup)
    for _ in range(3):
        meta_step(setup, state)
    path = checkpoint.save(tmp_path, snapshot(setup, state), 1, None)
    other = setup_of("algo.multi_step_loss=6")
    again = restore(other, checkpoint.load(path))
    for _ in range(2):
        meta_step(setup, state)
        meta_step(other, again)
    ours, theirs = (pytree.tree_leaves(s.meta) for s in (state, again))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_with_values_of_each_step_it_is_what_maml_plus_plus_learns() -> None:
    """Together with learned rates of each parameter and step."""
    setup = setup_of(
        "algo.multi_step_loss=6", "algo.per_step=[body.0.bias]", "inner_opt.learn=[lr]",
        "inner_opt.granularity=parameter_step",
    )  # fmt: skip
    state = fresh(setup)
    before = {name: value.detach().clone() for name, value in state.meta.items()}
    for _ in range(2):
        meta_step(setup, state)
    for name, value in state.meta.items():
        per_step = name.startswith("inner_opt.") or name == "body.0.bias"
        moved = (value.detach() != before[name]).reshape(len(value), -1).any(dim=1)
        assert moved.all() if per_step else moved.any(), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["algo.inner_steps=0"], "needs inner steps"),
        (["algo.multi_step_loss=-1"], "must be 0 or more"),
        (["engine.gradient=implicit", "engine.proximal=1"], "derivative of each inner step"),
        (["engine.gradient=truncated", "engine.last=2"], "derivative of each inner step"),
        (["engine.gradient=evolution"], "derivative of each inner step"),
        (["engine.gradient=checkpoint", "engine.block=2"], "each step"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=words):
        setup = setup_of("algo.multi_step_loss=5", *settings)
        meta_step(setup, fresh(setup))
