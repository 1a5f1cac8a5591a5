"""Metric methods and heads in closed form, against implementations of others."""

import json
from pathlib import Path

import learn2learn as l2l
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.algo.adapting import Support, one_hot
from metarun.components.algo.base import OBJECTIVES, Algorithm, InnerLoop, Problem
from metarun.components.algo.protonet import protonet
from metarun.components.algo.r2d2 import r2d2, ridge_regression
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.unroll import sgd
from tests.conftest import Metarun

F64 = torch.float64
RUN = (
    "train", "data=glyphs", "backbone.width=4", "trainer.steps=3", "trainer.meta_batch=2",
    "trainer.eval_episodes=4", "trainer.test_episodes=8", "task.query=3", "hydra.run.dir=run",
)  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(ways: tuple[int, int] | None = (3, 3)) -> Problem:
    torch.manual_seed(0)
    model: nn.Module = MLP((4,), 3, hidden=(6,)) if ways is None else Conv4((1, 28, 28), 3, width=4)
    kind = "regression" if ways is None else "classification"
    inner = InnerLoop(sgd(0.1), (), "global", {})
    return Problem(model.double(), OBJECTIVES[kind], inner, 3, None, ways)


def task(way: int, shot: int) -> Episodes:
    labels = torch.arange(way).repeat_interleave(shot)
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    x, queries = (numbers(len(labels), 1, 28, 28, seed=seed) for seed in (2, 3))
    return Episodes(x, labels[mixed], queries, labels)


def predicted(algorithm: Algorithm, given: Episodes, way: int | None) -> Tensor:
    assert algorithm.adapt is not None
    return algorithm.adapt(algorithm.init(), given.support_x, given.support_y, way)(given.query_x)


@pytest.mark.parametrize(("way", "shot"), [(3, 1), (3, 4), (5, 2)])
def test_protonet_is_that_of_learn2learn(way: int, shot: int) -> None:
    """Its loss, its gradient, and its scores up to what is common to all classes."""
    ours = problem((way, way))
    algorithm, given = protonet(ours), task(way, shot)
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    loss = algorithm.loss(meta, given)[0]
    classifier = l2l.nn.PrototypicalClassifier()
    features = ours.model.features
    classifier.fit_(features(given.support_x), given.support_y)
    expected = F.cross_entropy(classifier(features(given.query_x)), given.query_y)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    grads = torch.autograd.grad(loss, list(meta.values()))
    theirs = torch.autograd.grad(expected, [ours.model.get_parameter(name) for name in meta])
    torch.testing.assert_close(grads, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("n", [3, 6, 7, 30])
def test_ridge_regression_is_the_least_squares_of_a_longer_system(n: int) -> None:
    """‖XW − Y‖² / n + λ‖W‖² is ‖[X; √(nλ) I] W − [Y; 0]‖² / n, which NumPy solves by an SVD."""
    x, y, ridge = numbers(n, 6), numbers(n, 2, seed=1), 0.3
    ours = ridge_regression(x, y, ridge)
    design = np.concatenate([x.numpy(), np.ones((n, 1))], 1)
    longer = np.concatenate([design, np.sqrt(n * ridge) * np.eye(7)])
    right = np.linalg.lstsq(longer, np.concatenate([y.numpy(), np.zeros((7, 2))]), rcond=None)[0]
    torch.testing.assert_close(ours, torch.from_numpy(right), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learned", [False, True])
def test_r2d2_scores_by_the_ridge_regression_of_the_labels(learned: bool) -> None:
    ours = problem((4, 4))
    algorithm = r2d2(ours, ridge=2.0, learn_ridge=learned, scale=3.0)
    given = task(4, 2)
    features = ours.model.features(given.support_x)
    head = ridge_regression(features, F.one_hot(given.support_y, 4).double(), 2.0)
    queries = ours.model.features(given.query_x)
    right = 3 * (queries @ head[:-1] + head[-1])
    torch.testing.assert_close(predicted(algorithm, given, 4), right, rtol=1e-9, atol=1e-12)
    own = {name for name in algorithm.init() if name.startswith("algo.")}
    assert own == {"algo.scale"} | ({"algo.ridge"} if learned else set())


def test_r2d2_regresses_where_there_are_no_classes() -> None:
    ours = problem(None)
    algorithm = r2d2(ours, ridge=1e-9)
    x, y = numbers(5, 4), numbers(5, 3, seed=1)
    given = Episodes(x, y, x, y)
    torch.testing.assert_close(predicted(algorithm, given, None), y, rtol=1e-4, atol=1e-5)


def test_a_learned_ridge_has_a_gradient_and_no_weight_decay(
    metarun: Metarun, tmp_path: Path
) -> None:
    done = metarun(*RUN, "algo=r2d2", "algo.learn_ridge=true", "outer_opt.weight_decay=0.9")
    assert "2 hyperparameters learned" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    final = next(line for line in reversed(logged) if "algo/ridge" in line)
    assert final["algo/ridge"] == pytest.approx(np.log(50), rel=0.01)
    assert "algo/scale" in final


def test_what_has_no_features_or_no_classes_is_refused() -> None:
    bare = problem()._replace(model=nn.Linear(4, 3))
    for algorithm, name in ((protonet, "protonet"), (r2d2, "r2d2")):
        with pytest.raises(ValueError, match=rf"algo={name} needs the features .*features\(x\)"):
            algorithm(bare)
    with pytest.raises(ValueError, match="choose data that have classes"):
        protonet(problem(None))
    with pytest.raises(ValueError, match=r"algo\.scale=3.0: it is for scores of classes"):
        r2d2(problem(None), scale=3.0)
    with pytest.raises(ConfigError, match=r"algo\.ridge=0: must be above 0"):
        r2d2(problem(), ridge=0)


def test_one_hot_labels_may_lack_a_class() -> None:
    """Rows of 0 for what is not there: a task of fewer classes in a batch of wider ones."""
    support = Support(numbers(2, 3), torch.tensor([2, 0]), 3)
    assert one_hot(support).tolist() == [[0, 0, 1], [1, 0, 0]]


# ---------------------------------------------------------------- shapes of tasks


@pytest.mark.parametrize("algo", ["protonet", "simpleshot"])
def test_a_result_says_what_tasks_the_run_was_trained_on(
    algo: str, metarun: Metarun, tmp_path: Path
) -> None:
    """Whatever shape the evaluation asks for; of plain batches it says nothing."""
    shape = ["task.train.way=7"] if algo == "protonet" else []
    metarun(*RUN, f"algo={algo}", "task.way=4", *shape)
    done = metarun("eval", "ckpt=run", "task.shot=2", "episodes=5", "hydra.run.dir=other")
    test = json.loads((tmp_path / "other" / "result.json").read_text())["test"]
    if algo == "protonet":
        assert test["trained_on"] == {"way": 7, "shot": 1, "query": 3}
        assert "4-way 2-shot" in done.stdout and "trained on 7-way 1-shot" in done.stdout
    else:
        assert "trained_on" not in test and "trained on" not in done.stdout


@pytest.mark.parametrize("algo", ["protonet", "r2d2"])
def test_tasks_of_training_and_evaluation_may_differ(
    algo: str, metarun: Metarun, tmp_path: Path
) -> None:
    shape = ("task.way=4", "task.train.way=7", "task.train.shot=2", "task.train.query=1")
    done = metarun(*RUN, f"algo={algo}", *shape)
    assert "4-way 1-shot, 3 queries a class, batch norm" in done.stdout
    assert "trained on 7-way 2-shot" in done.stdout and "inner steps" not in done.stdout
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert (test["way"], test["inner_steps"]) == (4, None)
    assert test["trained_on"] == {"way": 7, "shot": 2, "query": 1}
    wider = metarun("eval", "ckpt=run", "task.way=10", "episodes=5", "hydra.run.dir=wider")
    assert "10-way 1-shot" in wider.stdout and "trained on 7-way 2-shot" in wider.stdout
    again = metarun("eval", "ckpt=run", "hydra.run.dir=again")
    score = json.loads((tmp_path / "again" / "result.json").read_text())["test"]["accuracy"]
    assert score == test["accuracy"] and "4-way" in again.stdout
    metarun("report", ".", "out=page")


def test_a_network_with_a_head_of_its_own_has_one_way(metarun: Metarun) -> None:
    said = metarun(*RUN, "task.train.way=7", code=2).stderr
    assert "task.train.way=7: algo=maml learns a network that tells task.way=5 classes" in said
    metarun(*RUN, "task.train.shot=2")
    said = metarun("eval", "ckpt=run", "task.way=3", "hydra.run.dir=e", code=2).stderr
    assert "the checkpoint's network tells 5 classes apart" in said
    said = metarun("train", "data=sinusoid", "backbone=mlp", "task.train.way=3", code=2).stderr
    assert "task.train.way=3: the tasks of data=sinusoid are regression" in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("engine.gradient=mixed", "engine.gradient=mixed: algo=protonet has no inner loop"),
        ("inner_opt=adam", "inner_opt=adam: algo=protonet has no inner loop"),
        ("inner_opt.lr=0.1", "inner_opt.lr=0.1: algo=protonet has no inner loop"),
        ("inner_opt.learn=[lr]", "inner_opt.learn: algo=protonet has no inner loop"),
        ("task.train.way=2000", "task.train.way=2000 is more than the"),
        ("task.train.shot=0", "task.train.shot=0: must be from 1"),
    ],
)
def test_what_it_has_no_use_for_is_refused(setting: str, message: str, metarun: Metarun) -> None:
    assert message in metarun(*RUN, "algo=protonet", setting, code=2).stderr
