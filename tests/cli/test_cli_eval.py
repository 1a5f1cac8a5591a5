"""`metarun eval` with other settings than the run had: used, named in the result, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Metarun

TINY = (
    "data=glyphs", "backbone=mlp", "backbone.hidden=[8]", "trainer.steps=2", "task.way=3",
    "trainer.meta_batch=2", "trainer.eval_episodes=2", "trainer.test_episodes=6",
    "hydra.run.dir=run",
)  # fmt: skip


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.parametrize(
    ("algo", "changes"),
    [
        ("reptile", {"algo.inner_batch": 1}),
        ("maml", {"algo.reduction": "per_shot", "algo.adapt": ["head.*"], "inner_opt.lr": 0.05}),
        ("protonet", {"data.seed": 3}),
        ("r2d2", {"algo.ridge": 1.0}),
    ],
)
def test_a_setting_of_the_run_can_be_changed_and_is_named(
    metarun: Metarun, tmp_path: Path, algo: str, changes: dict[str, Any]
) -> None:
    steps = ("algo.eval_inner_steps=3",) if algo not in ("protonet", "r2d2") else ()
    metarun("train", f"algo={algo}", *TINY, *steps)
    metarun("eval", "ckpt=run", "hydra.run.dir=same")
    same = result(tmp_path / "same")
    assert same["changed"] == {}
    for change, value in changes.items():
        done = metarun(
            "eval", "ckpt=run", f"{change}={json.dumps(value)}", f"hydra.run.dir={change}"
        )
        other = result(tmp_path / change)
        assert other["changed"] == {change: value}
        assert f"otherwise than in training: {change}={value}" in done.stderr
        assert same["test"]["loss_per_inner_step"] != other["test"]["loss_per_inner_step"]
        assert ("other data than in training" in done.stdout) == change.startswith("data.")


def test_what_cannot_be_changed_is_refused(metarun: Metarun) -> None:
    metarun("train", *TINY)
    for change, words in {
        "algo.inner_steps=2": "algo.inner_steps: it is of training alone",
        "algo.order=1": "algo.order: it is of training alone",
        "algo.ordr=1": "algo=maml has no such setting (did you mean algo.order?)",
        "data.sede=1": "data=glyphs has no such setting (did you mean data.seed?)",
        "algo.adapt=3": "algo.adapt=3: must be list[str]",
        "algo.reduction=sum": "algo.reduction=sum: choose one of mean, per_shot",
        "data.seed=-1": "data.seed=-1: must be from 0",
        "algo.name=anil": "algo.name: algo=maml has no such setting",
        "inner_opt.learn=[lr]": "inner_opt.learn: it is of training alone",
        "algo.per_step=[head.*]": "algo.per_step: what the run has learned does not fit it",
        "algo.adapt=[nothing.*]": "no parameter matches 'nothing.*'",
    }.items():
        done = metarun("eval", "ckpt=run", change, "hydra.run.dir=other", code=2)
        assert words in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["eval", "ckpt=x", "more=${seed}"], "more=None: must be a dict"),
        (["eval", "ckpt=x", "+more.trainer.steps=3"], "more: write algo.<setting>=…"),
        (["eval", "ckpt=x", "+more.algo=3"], "more: write algo.<setting>=…"),
        (["train", "inner_opt.groups=${oc.env:HOME}"], "must be a list"),
        (["train", "algo.adapt=${seed}"], "algo.adapt=0: must be a list"),
        (["train", "backbone=mlp", "backbone.hidden=${oc.env:HOME}"], "must be a list"),
        (["train", "inner_opt=partition", "inner_opt.parts=${seed}"], "parts=0: must be a list"),
    ],
)
def test_a_reference_to_something_else_is_refused(
    metarun: Metarun, command: list[str], words: str
) -> None:
    """An interpolation gives what no typed value could."""
    done = metarun(*command, code=2)
    assert words in done.stderr and "unexpected" not in done.stderr


def test_what_cannot_change_the_figure_is_refused_or_told(metarun: Metarun) -> None:
    metarun("train", "algo=r2d2", *TINY, "algo.learn_ridge=true")
    for key in ("scale", "ridge", "learn_ridge"):
        done = metarun("eval", "ckpt=run", f"algo.{key}=1", "hydra.run.dir=other", code=2)
        assert f"algo.{key}: it is of training alone" in done.stderr
    metarun("train", "algo=reptile", *TINY[:-1], "algo.eval_inner_steps=2", "hydra.run.dir=rep")
    done = metarun("eval", "ckpt=rep", "algo.inner_batch=3", "hydra.run.dir=other")
    assert "without effect: algo.inner_batch=3 (a task has no more than 3" in done.stderr
    rate = ("inner_opt.learn=[lr]", "hydra.run.dir=rate")
    metarun("train", *TINY[:-1], *rate)
    done = metarun("eval", "ckpt=rate", "inner_opt.lr=1", "hydra.run.dir=more", code=2)
    assert "inner_opt.lr: the run has learned it" in done.stderr


def test_a_schedule_that_ends_can_be_told_to_go_on(metarun: Metarun) -> None:
    metarun("train", *TINY, "algo.inner_steps=3", "inner_opt.schedule=cosine")
    more = ("eval", "ckpt=run", "algo.eval_inner_steps=5", "hydra.run.dir=more")
    assert "set inner_opt.min_lr, or inner_opt.schedule_steps=5" in metarun(*more, code=2).stderr
    metarun(*more, "inner_opt.min_lr=0.01")
