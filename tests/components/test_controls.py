"""Controls, in which nothing is meta-learned, against scikit-learn and plain torch."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.nearest_neighbour import nearest_neighbour
from metarun.components.algo.scratch import scratch
from metarun.components.backbone.mlp import MLP
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.rundir.metrics import read_metrics
from metarun.unroll import sgd
from tests.conftest import Metarun
from tests.setups import IMAGES, SINE, setup_of, task_of

GLYPHS = (
    "train", "data=glyphs", "backbone.width=3", "task.query=3", "trainer.eval_episodes=5",
    "trainer.test_episodes=20",
)  # fmt: skip


def problem(**changes: object) -> Problem:
    model = MLP((4,), 3, hidden=(6,)).double()
    given = Problem(
        model, OBJECTIVES["classification"], InnerLoop(sgd(0.1), (), "global", {}), 3, None, (3, 3)
    )
    return given._replace(**changes)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_nearest_neighbours_are_those_of_scikit_learn(k: int) -> None:
    setup = setup_of(*IMAGES, "algo=nearest_neighbour", f"algo.k={k}", "task.shot=3")
    assert setup.algorithm.adapt is not None and setup.algorithm.init() == {}
    for index in range(10):
        task = task_of(setup, index)
        scores = setup.algorithm.adapt({}, task.support_x, task.support_y, 3)(task.query_x)
        theirs = KNeighborsClassifier(k, algorithm="brute")
        theirs.fit(flat(task.support_x), task.support_y)
        votes = torch.from_numpy(theirs.predict_proba(flat(task.query_x))) * k
        assert torch.equal(scores.floor(), votes.round())


def test_of_classes_with_as_many_votes_the_nearer_one_wins() -> None:
    ours = nearest_neighbour(problem(), k=4)
    assert ours.adapt is not None
    support = torch.tensor([[0.0], [4.0], [5.0], [6.0], [100.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0, 1, 2])
    scores = ours.adapt({}, support, labels, 3)(torch.tensor([[3.9], [1.9]], dtype=torch.float64))
    assert scores.argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(scores[0, :2] - 2, torch.tensor([0.5 / 1.1, 0.5 / 3.1]).double())


def test_in_a_regression_it_is_the_mean_of_the_nearest_targets() -> None:
    setup = setup_of(*SINE, "algo=nearest_neighbour", "algo.k=3")
    assert setup.algorithm.adapt is not None
    task = task_of(setup)
    ours = setup.algorithm.adapt({}, task.support_x, task.support_y, None)(task.query_x)
    theirs = KNeighborsRegressor(3).fit(task.support_x, task.support_y)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.predict(task.query_x)))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training_from_scratch_is_that_of_torchs_optimizer(kind: str) -> None:
    torch.manual_seed(0)
    ways = (3, 3) if kind == "classification" else None
    inner = InnerLoop(sgd(0.05, momentum=0.9), (), "global", {})
    ours = problem(objective=OBJECTIVES[kind], inner=inner, ways=ways)
    x, queries = torch.randn(2, 6, 4, dtype=torch.float64)
    y = torch.arange(6) % 3 if ways else torch.randn(6, 3, dtype=torch.float64)
    algorithm, loss = scratch(ours, eval_inner_steps=4), ours.objective.loss
    trace = algorithm.trace(algorithm.init(), Episodes(x, y, queries, y))
    optimizer, expected = torch.optim.SGD(ours.model.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(5):
        expected.append(loss(ours.model(queries), y).detach())
        optimizer.zero_grad()
        loss(ours.model(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(trace.query_loss.detach(), torch.stack(expected), rtol=1e-9, atol=0)


def test_a_control_has_no_meta_steps_and_says_so(metarun: Metarun, tmp_path: Path) -> None:
    """Its figure is that of the nearest pixels, and its checkpoint has no parameters."""
    done = metarun(*GLYPHS, "algo=nearest_neighbour", "hydra.run.dir=run")
    assert "algo=nearest_neighbour meta-learns nothing: there are no meta-steps" in done.stderr
    assert "and backbone, trainer.steps, trainer.meta_batch and outer_opt have" in done.stderr
    assert "seed 0: nothing meta-learned, on CPU" in done.stdout
    assert "3 queries a class, batch norm: none, nothing meta-learned)" in done.stdout
    assert "parameters: none learned, none frozen" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["best"]["step"], result["test"]["meta_learned"]) == (
        0,
        0,
        False,
    )
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "best.safetensors")["meta"] == {}
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["val/accuracy" in record for record in records] == [True]
    source, hits = setup_of("task.query=3").source, []
    for index in range(20):
        support_x, support_y, query_x, query_y = (x[0] for x in source.sample("test", index, 1))
        nearest = torch.cdist(query_x.flatten(1), support_x.flatten(1)).argmin(1)
        hits.append((support_y[nearest] == query_y).double().mean())
    assert result["test"]["accuracy_per_task"] == torch.stack(hits).tolist()
    again = metarun("eval", "ckpt=run", "task.way=7", "algo.k=2", "task.shot=2", "hydra.run.dir=e")
    assert "7-way 2-shot" in again.stdout and "nothing meta-learned" in again.stdout
    metarun("report", ".", "out=page")


def test_a_control_starts_at_the_weights_of_its_seed(metarun: Metarun, tmp_path: Path) -> None:
    sine = ("train", "algo=scratch", "data=sinusoid", "backbone=mlp", "backbone.hidden=[6]")
    few = ("algo.eval_inner_steps=3", "trainer.eval_episodes=4", "trainer.test_episodes=4")
    done = metarun(*sine, *few, "seed=2", "hydra.run.dir=run", "outer_opt.schedule=cosine")
    assert "mse after 0, 1, … inner steps" in done.stdout and "none learned, 61" not in done.stdout
    meta = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.safetensors")["meta"]
    fresh = setup_of(*sine[1:], "seed=2").algorithm.init()
    assert meta.keys() == fresh.keys() and all(torch.equal(meta[n], fresh[n]) for n in fresh)
    metarun("eval", "ckpt=run", "hydra.run.dir=again", "algo.eval_inner_steps=3")
    tests = [json.loads((tmp_path / f / "result.json").read_text()) for f in ("run", "again")]
    assert tests[0]["test"]["mse_per_task"] == tests[1]["test"]["mse_per_task"]
    recalled = metarun(*sine, *few, "seed=2", "hydra.run.dir=run", "outer_opt.schedule=cosine")
    assert "nothing to do" in recalled.stderr
    (tmp_path / "run" / "result.json").unlink()
    again = metarun(*sine, *few, "seed=2", "hydra.run.dir=run", "outer_opt.schedule=cosine")
    assert "resuming after meta-step 0" in again.stderr and "val mse" not in again.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("algo=nearest_neighbour", "algo.k=6"), "algo.k=6: a task has only 5 support examples"),
        (("algo=nearest_neighbour", "algo.k=0"), "algo.k=0: must be from 1"),
        (("algo=nearest_neighbour", "inner_opt.lr=1"), "algo=nearest_neighbour has no inner loop"),
        (("algo=nearest_neighbour", "backbone.norm=running"), "uses no network; leave it out"),
        (("algo=scratch", "backbone.norm=running"), "algo=scratch has no meta-training"),
        (("algo=scratch", "task.train.shot=2"), "algo=scratch meta-learns nothing, and has no"),
        (("algo=scratch", "inner_opt.learn=[lr]"), "differentiates nothing through its inner"),
        (("algo=scratch", "engine.gradient=mixed"), "algo=scratch differentiates nothing"),
    ],
)
def test_what_has_no_meaning_for_a_control_is_refused(
    settings: tuple[str, ...], message: str, metarun: Metarun
) -> None:
    assert message in metarun(*GLYPHS, *settings, code=2).stderr


def test_a_network_without_weights_to_adapt_is_refused() -> None:
    frozen = problem()
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match="has frozen all its parameters"):
        scratch(frozen)
    with pytest.raises(ConfigError, match="eval_inner_steps"):
        scratch(problem(), eval_inner_steps=-1)
