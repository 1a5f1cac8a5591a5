"""Reptile and the baseline against the same written in plain torch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.baseline import baseline
from metarun.components.algo.minibatches import minibatches
from metarun.components.algo.reptile import reptile
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.episodes.source import Batches, ImageEpisodes
from metarun.training.loop import meta_step
from metarun.training.setup import build
from metarun.training.state import fresh
from metarun.unroll import adam, newton, sgd
from tests.conftest import Metarun
from tests.setups import config_of

CPU = torch.device("cpu")
REPTILE = (
    "algo=reptile", "data=sinusoid", "backbone=mlp", "backbone.hidden=[6]", "inner_opt=adam",
    "inner_opt.lr=0.01", "inner_opt.beta1=0", "outer_opt=sgd", "outer_opt.lr=0.5",
    "engine.precision=float64", "algo.inner_steps=3", "trainer.steps=9",
)  # fmt: skip


def inner_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_reptile_takes_the_steps_of_plain_torch(size: int, keep: bool) -> None:
    """θ ← θ + ε·mean(φ − θ); Adam's moments go on, as their mean over the tasks, or start anew."""
    settings = (*REPTILE, f"trainer.meta_batch={size}", f"algo.keep_moments={keep}")
    setup = build(config_of(*settings), CPU)
    state = fresh(setup)
    model = MLP((1,), 1, hidden=(6,)).double()
    names = [name for name, _ in model.named_parameters()]
    theta = {name: state.meta[name].detach().clone() for name in names}
    moments: Any = None
    for step in range(4):
        tasks = setup.train_tasks.sample(step * size, size)
        ends, states = [], []
        for i in range(size):
            model.load_state_dict(theta)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.0, 0.999))
            if keep and moments is not None:
                for p, kept in zip(model.parameters(), moments, strict=True):
                    optimizer.state[p] = {key: value.clone() for key, value in kept.items()}
            inner_loop(model, optimizer, tasks.support_x[i], tasks.support_y[i], 3)
            ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
            states.append([dict(optimizer.state[p]) for p in model.parameters()])
        moments = [
            {key: torch.stack([s[k][key] for s in states]).mean(0) for key in states[0][k]}
            for k in range(len(names))
        ]
        for name in names:
            theta[name] += 0.5 * torch.stack([end[name] - theta[name] for end in ends]).mean(0)
        meta_step(setup, state)
        for name in names:
            torch.testing.assert_close(
                state.meta[name].detach(), theta[name], rtol=1e-9, atol=1e-12
            )
    assert any(name.startswith("moments.") for name in state.meta) == keep


def test_moments_are_kept_in_checkpoints_and_used_by_evaluations(
    metarun: Metarun, tmp_path: Path
) -> None:
    small = ("trainer.meta_batch=2", "trainer.eval_episodes=5", "trainer.test_episodes=5")
    command = ("train", *REPTILE, *small, "algo.eval_inner_steps=4", "trainer.eval_every=3")
    metarun(*command, "hydra.run.dir=run", "trainer.checkpoint_every=3")
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    metarun("eval", "ckpt=run", "hydra.run.dir=again")
    again = json.loads((tmp_path / "again" / "result.json").read_text())["test"]
    assert again["mse_per_task"] == test["mse_per_task"]
    metarun(*command, "hydra.run.dir=other", "algo.keep_moments=false")
    other = json.loads((tmp_path / "other" / "result.json").read_text())["test"]
    assert other["mse_per_task"] != test["mse_per_task"]


@pytest.mark.parametrize(("examples", "size", "steps"), [(10, 4, 5), (6, 2, 9), (5, 4, 1)])
def test_each_deck_of_the_minibatches_has_every_example(
    examples: int, size: int, steps: int
) -> None:
    turns = minibatches(examples, size, steps, CPU)
    assert turns is not None and turns.shape == (steps, size)
    dealt = turns.flatten().tolist()
    for start in range(0, len(dealt) - examples + 1, examples):
        assert sorted(dealt[start : start + examples]) == list(range(examples))
    for whole in (examples, None):
        assert minibatches(examples, whole, steps, CPU) is None


def problem(**changes: Any) -> Problem:
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 3, width=4).double()
    inner = InnerLoop(sgd(0.1, momentum=0.9, dampening=0.9, weight_decay=1e-3), (), "global", {})
    given = Problem(
        model, OBJECTIVES["classification"], inner, 3, None, (3, 3), (1, 28, 28), classes=7
    )
    return given._replace(**changes)


def test_the_head_of_the_baseline_is_that_of_torchs_sgd() -> None:
    ours = problem()
    algorithm = baseline(ours, eval_inner_steps=6)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64, generator=generator)
    y, queries = torch.tensor([0, 0, 1, 1, 2, 2]), x.flip(-1)
    assert algorithm.adapt is not None
    scores = algorithm.adapt(algorithm.init(), x, y, 3)(queries)
    features = ours.model.features(x).detach()
    head = nn.Linear(features.shape[1], 3).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    options = {"momentum": 0.9, "dampening": 0.9, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(head.parameters(), 0.1, **options)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(head(features), y).backward()
        optimizer.step()
    torch.testing.assert_close(scores, head(ours.model.features(queries)), rtol=1e-9, atol=1e-12)


def test_plain_batches_have_the_images_of_their_labels() -> None:
    setup = build(config_of("algo=baseline", "algo.batch_size=64", "backbone.width=4"), CPU)
    source, tasks = setup.source, setup.train_tasks
    assert isinstance(source, ImageEpisodes) and isinstance(tasks, Batches)
    store = source.stores["train"]
    batch = tasks.sample(5, 3)
    assert batch.x.shape == (3, 64, 1, 28, 28) and batch.y.shape == (3, 64)
    for x, label in zip(batch.x[1], batch.y[1].tolist(), strict=True):
        first = store.starts[label]
        own = store.images[first : first + store.sizes[label]].float() / 255
        assert any(torch.equal(x, image) for image in own)
    for i in range(3):  # a function of the number alone
        alone = tasks.sample(5 + i, 1)
        assert torch.equal(alone.x[0], batch.x[i]) and torch.equal(alone.y[0], batch.y[i])
    labels = torch.cat([tasks.sample(i, 50).y.flatten() for i in range(0, 1000, 50)])
    counts = torch.bincount(labels, minlength=len(store.class_names)).double()
    wanted = len(labels) * store.sizes / store.sizes.sum()
    chi = ((counts - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert abs(float(chi) - freedom) < 5 * (2 * freedom) ** 0.5, "as often as any other image"


@pytest.mark.parametrize("norm", ["transductive", "support", "support_plus_one"])
def test_the_figures_of_training_are_under_the_norm_that_was_chosen(norm: str) -> None:
    settings = ["algo=reptile", "backbone.width=4", f"backbone.norm={norm}", "task.query=2"]
    setup = build(config_of(*settings, "trainer.meta_batch=1"), CPU)
    meta = {name: value.requires_grad_() for name, value in setup.algorithm.init().items()}
    task = type(setup.train_tasks.sample(0, 1))(*(x[0] for x in setup.train_tasks.sample(0, 1)))
    shown = setup.algorithm.loss(meta, task)[1]["loss"]
    own = fresh(setup).meta
    few = build(config_of(*settings, "algo.eval_inner_steps=5"), CPU)
    assert few.algorithm.adapt is not None
    predict = few.algorithm.adapt(own, task.support_x, task.support_y, 5)
    torch.testing.assert_close(shown, F.cross_entropy(predict(task.query_x), task.query_y))


def test_what_changes_nothing_is_refused(metarun: Metarun) -> None:
    small = ("backbone.width=4", "trainer.steps=1")
    for algo in ("reptile", "baseline"):
        said = metarun("train", f"algo={algo}", *small, "engine.gradient=mixed", code=2).stderr
        assert f"algo={algo} differentiates nothing through its inner steps" in said
    said = metarun("train", "algo=baseline", *small, "task.train.shot=2", code=2).stderr
    assert "algo=baseline learns from plain batches, and has no training tasks" in said
    for inner in ("mixed", "muon"):
        said = metarun("train", "algo=baseline", *small, f"inner_opt={inner}", code=2).stderr
        assert "unexpected" not in said


def test_what_they_cannot_do_is_refused(metarun: Metarun) -> None:
    learned = InnerLoop(sgd(0.1), ("lr",), "global", {})
    for algorithm in (reptile, baseline):
        with pytest.raises(ValueError, match=r"differentiates nothing .*inner_opt\.learn"):
            algorithm(problem(inner=learned))
    with pytest.raises(ValueError, match="gradients alone"):
        reptile(problem(inner=InnerLoop(newton(), (), "global", {})))
    with pytest.raises(ValueError, match="labelled images"):
        baseline(problem(classes=None))
    said = metarun("train", "algo=baseline", "data=sinusoid", "backbone=mlp", code=2).stderr
    assert "algo=baseline learns from plain batches of labelled images" in said
    assert adam(0.1).hyper["lr"] == 0.1
