"""Which moments normalise the queries: against the same written layer by layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.components.backbone import conv4
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.norm import BatchNorm, Seen, collecting, using
from metarun.episodes.source import Episodes
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import fresh, restore, snapshot
from metarun.unroll._torch import pytree
from metarun.unroll.advice import UnsuitableModel
from tests.conftest import Metarun
from tests.setups import config_of

CPU = torch.device("cpu")
NORMS = ("transductive", "support", "support_plus_one", "running")
TINY = (
    "data=glyphs", "backbone.width=4", "trainer.meta_batch=2", "trainer.steps=6", "task.way=3",
    "task.shot=2", "task.query=2",
)  # fmt: skip


def setup_of(algo: str, norm: str, *more: str) -> Setup:
    settings = [f"algo={algo}", f"backbone.norm={norm}", *TINY, "engine.precision=float64", *more]
    return build(config_of(*settings), CPU)


def task_of(setup: Setup, index: int = 0) -> Episodes:
    return Episodes(*(part[0] for part in setup.source.sample("test", index, 1)))


def network(meta: dict[str, Tensor]) -> Conv4:
    model = Conv4((1, 28, 28), 3, width=4).double()
    own = {k: v for k, v in meta.items() if not k.startswith("norm.")}
    model.load_state_dict(own, strict=False)
    return model


def normalised(norm: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    m, v, weight, bias = (t.view(1, -1, 1, 1) for t in (mean, variance, norm.weight, norm.bias))
    return (x - m) / (v + norm.eps).sqrt() * weight + bias


def features(model: Conv4, x: Tensor, by: Tensor | list[tuple[Tensor, Tensor]]) -> Tensor:
    """Features of x, each layer normalised by the moments of `by`: of these examples, or given."""
    for i, block in enumerate(model.body):
        conv, norm, relu = block  # type: ignore[misc]
        if isinstance(by, Tensor):
            by = conv(by)
            mean, variance = by.mean((0, 2, 3)), by.var((0, 2, 3), correction=0)
        else:
            mean, variance = by[i]
        x = relu(normalised(norm, conv(x), mean, variance))
        if isinstance(by, Tensor):
            by = relu(normalised(norm, by, mean, variance))
    return x.mean((-2, -1))


def by_hand(norm: str, model: Conv4, task: Episodes, averages: Any = None) -> Tensor:
    """ProtoNet's scores."""
    own, queries = task.support_x, task.query_x
    z = features(model, own, averages if norm == "running" else own)
    if norm == "transductive":
        q = features(model, queries, queries)
    elif norm == "support_plus_one":
        each = [torch.cat([own, one[None]]) for one in queries]
        q = torch.stack([features(model, both, both)[-1] for both in each])
    else:
        q = features(model, queries, averages if norm == "running" else own)
    means = torch.stack([z[task.support_y == k].mean(0) for k in range(3)])
    return -(q[:, None] - means).pow(2).sum(-1)


@pytest.mark.parametrize("norm", NORMS)
def test_scores_are_those_written_layer_by_layer(norm: str) -> None:
    setup = setup_of("protonet", norm)
    state = fresh(setup)
    for _ in range(2):
        meta_step(setup, state)
    meta = {name: value.detach() for name, value in state.meta.items()}
    averages = (
        [(meta[f"norm.{i}.mean"], meta[f"norm.{i}.var"]) for i in range(4)]
        if (norm == "running")
        else None
    )
    for index in range(2):
        task = task_of(setup, index)
        right = by_hand(norm, network(meta), task, averages)
        assert setup.algorithm.adapt is not None
        ours = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)
        trace = setup.algorithm.trace(meta, task)
        expected = nn.functional.cross_entropy(right, task.query_y)
        torch.testing.assert_close(trace.query_loss[-1], expected)


def test_moving_averages_are_torchs() -> None:
    """Of support set and queries of a task, then the mean over the tasks of a meta-batch."""
    setup = setup_of("protonet", "running")
    state = fresh(setup)
    model = network({k: v.detach() for k, v in state.meta.items()})
    tasks = setup.train_tasks.sample(0, 2)
    expected = []
    for i in range(2):
        layer = nn.BatchNorm2d(4, momentum=1.0).double()
        found = []
        for x in (tasks.support_x[i], tasks.query_x[i]):
            layer(model.body[0][0](x))  # type: ignore[index]
            found.append((layer.running_mean.clone(), layer.running_var.clone()))  # type: ignore[union-attr]
        expected.append([torch.stack(part).mean(0) for part in zip(*found, strict=True)])
    mean, variance = (torch.stack(part).mean(0) for part in zip(*expected, strict=True))
    meta_step(setup, state)
    torch.testing.assert_close(state.meta["norm.0.mean"], 0.1 * mean)
    torch.testing.assert_close(state.meta["norm.0.var"], 0.9 + 0.1 * variance)
    assert not state.meta["norm.0.mean"].requires_grad


@pytest.mark.parametrize("algo", ["maml", "anil", "protonet", "r2d2"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_prediction_depends_on_other_queries_only_if_it_is_transductive(
    algo: str, norm: str
) -> None:
    setup = setup_of(algo, norm)
    meta, task = setup.algorithm.init(), task_of(setup)
    assert setup.algorithm.adapt is not None
    predict = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)
    alone = torch.cat([predict(x[None]) for x in task.query_x])
    same = torch.allclose(alone, predict(task.query_x), rtol=1e-9, atol=1e-11)
    assert same == (norm != "transductive")


@pytest.mark.parametrize("algo", ["maml", "anil", "protonet", "r2d2"])
@pytest.mark.parametrize("norm", NORMS[1:])
def test_vmap_a_loop_and_a_recording_are_the_same(
    algo: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two blocks of conv4: recording takes time by the operation."""
    monkeypatch.setattr(conv4, "BLOCKS", 2)
    found: list[Any] = []
    for how in (("loop", "none"), ("loop", "replay"), ("vmap", "none"), ("vmap", "replay")):
        engine = [f"engine.{k}={v}" for k, v in zip(("batching", "compile"), how, strict=True)]
        few = ("algo.eval_inner_steps=2",) if algo in ("maml", "anil") else ()
        setup = setup_of(algo, norm, *engine, *few)
        meta = fresh(setup).meta
        for _ in range(2 if "replay" in how else 1):  # recorded, then compared
            grads, row = setup.gradient(meta, setup.train_tasks.sample(0, 2))
            with torch.no_grad():
                trace = setup.trace(meta, setup.source.sample("val", 0, 2))
        found.append([*(grads[name].detach() for name in meta), *pytree.tree_leaves(row), *trace])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-9)


def test_moving_averages_go_on_from_a_checkpoint_with_the_same_bits() -> None:
    whole, first, second = (setup_of("maml", "running") for _ in range(3))
    states = [fresh(whole), fresh(first)]
    for _ in range(4):
        meta_step(whole, states[0])
    for _ in range(2):
        meta_step(first, states[1])
    resumed = restore(second, snapshot(first, states[1]))
    for _ in range(2):
        meta_step(second, resumed)
    assert all(torch.equal(value, resumed.meta[k]) for k, value in states[0].meta.items())


def test_an_evaluation_may_choose_another_one(metarun: Metarun, tmp_path: Path) -> None:
    small = (
        "trainer.steps=3",
        "trainer.eval_episodes=4",
        "trainer.test_episodes=30",
        "algo=protonet",
    )
    said = metarun("train", *TINY[:-4], *small, "backbone.norm=running", "hydra.run.dir=run").stdout
    assert "batch norm: moving averages of training" in said
    scores = {}
    for norm in NORMS:
        metarun("eval", "ckpt=run", f"backbone.norm={norm}", f"hydra.run.dir={norm}")
        test = json.loads((tmp_path / norm / "result.json").read_text())["test"]
        scores[norm] = tuple(test["accuracy_per_task"])
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert scores["running"] == tuple(trained["accuracy_per_task"])
    assert len(set(scores.values())) == 4
    metarun("train", *TINY[:-4], *small, "hydra.run.dir=plain")
    refused = metarun("eval", "ckpt=plain", "backbone.norm=running", "hydra.run.dir=x", code=2)
    assert "trained with backbone.norm=transductive, which keeps no moving" in refused.stderr
    refused = metarun("eval", "ckpt=plain", "backbone.norm=batch", "hydra.run.dir=x", code=2)
    assert "backbone.norm=batch: choose one of transductive, support" in refused.stderr


def test_what_cannot_be_is_refused(metarun: Metarun) -> None:
    said = metarun("train", "algo=reptile", "backbone.norm=running", code=2).stderr
    assert "backbone.norm=running needs an algorithm that learns by a query loss" in said
    said = metarun("train", "data=sinusoid", "backbone=mlp", "backbone.norm=support", code=2).stderr
    assert "there is no setting 'backbone.norm'" in said


def test_a_layer_that_is_called_more_often_for_queries_is_refused() -> None:
    """Else it would take the moments of its batch, without a word."""
    layer, other = BatchNorm(2), BatchNorm(2)
    x = torch.randn(4, 2, 3, 3)
    with collecting() as seen:
        layer(x)
    with using(seen):
        layer(x)
        for late in (layer, other):
            with pytest.raises(UnsuitableModel, match="normalises queries more often"):
                late(x)
    with using(Seen()):
        assert torch.equal(layer(x), other(x))
    always = Seen(always=True)
    always.add(layer, seen.of[id(layer)][0])
    with using(always):
        assert all(torch.equal(layer(2 * x), layer(2 * x)) for _ in range(20))
