"""Uneven tasks from the command line: a run, its result, and what is done with it."""

import json
from pathlib import Path

import torch

from metarun.inference.trained import load
from tests.conftest import Metarun

RUN = (
    "train", "data=glyphs", "backbone=mlp_bn", "backbone.hidden=[32]", "task.query=4",
    "trainer.steps=4", "trainer.meta_batch=2", "trainer.eval_episodes=8",
    "trainer.test_episodes=8", "hydra.run.dir=run",
)  # fmt: skip
UNEVEN = ("task.way=8", "task.min_way=3", "task.shot=4", "task.min_shot=1")


def test_a_run_learns_from_uneven_tasks_and_names_them(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun(*RUN, "algo=protonet", *UNEVEN)
    assert "3 to 8-way 1 to 4-shot, 4 queries a class" in done.stdout
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    shape = {"way": 8, "min_way": 3, "shot": 4, "min_shot": 1, "query": 4}
    assert {key: test[key] for key in shape} == shape
    even = metarun("eval", "ckpt=run", "task.way=5", "task.min_way=5", "hydra.run.dir=even")
    assert "5-way 1 to 4-shot" in even.stdout
    shots = metarun("eval", "ckpt=run", "task.imbalanced=true", "hydra.run.dir=shots")
    assert "3 to 8-way imbalanced, 4 queries" in shots.stdout
    told = metarun("eval", "ckpt=run", "task.way=2", "hydra.run.dir=wrong", code=2)
    assert "task.min_way=3: must be at most task.way=2" in told.stderr
    told = metarun("eval", "ckpt=run", "calibrate=true", "hydra.run.dir=wrong", code=2)
    assert "calibrate=true is for tasks of one shape" in told.stderr
    metarun("explain", "ckpt=run", "out=task.png")
    assert (tmp_path / "task.png").stat().st_size > 1000
    report = metarun("report", "run")
    assert "3 to 8-way 1 to 4-shot" in report.stdout
    trained = load(tmp_path / "run", "cpu", way=2)  # tasks of people have the shape that they have
    x, labels = torch.rand(5, 1, 28, 28), torch.tensor([0, 0, 0, 1, 1])
    assert trained.adapt(x, labels, way=2)(x).isfinite().all()


def test_training_alone_may_be_uneven(metarun: Metarun, tmp_path: Path) -> None:
    train = ("task.train.way=9", "task.train.min_way=5", "task.train.imbalanced=true")
    more = ("task.train.shot=6", "task.train.max_support=30", "algo=r2d2")
    done = metarun(*RUN, *train, *more)
    trained = "trained on 5 to 9-way imbalanced (30 support examples at most)"
    assert "5-way 1-shot" in done.stdout and trained in done.stdout
