"""A run that is trained longer than it was begun with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from metarun.reporting.gather import read_run
from metarun.rundir import checkpoint
from metarun.rundir.checkpoint_fields import ELAPSED_FIELD
from metarun.rundir.longer import check_length, keep_earlier_result
from metarun.rundir.metrics import read_metrics
from metarun.training import plan
from metarun.training.setup import build
from metarun.training.state import fresh, snapshot
from tests.conftest import Metarun
from tests.setups import config_of

# Every 2 and 3 meta-steps, so that the last of 5 would be no occasion for anything in a longer run;
# `evolution` draws random numbers in each meta-step.
SHORT = (
    "data=sinusoid", "backbone=mlp", "trainer.meta_batch=2", "trainer.eval_every=2",
    "trainer.checkpoint_every=3", "trainer.log_every=3", "trainer.eval_episodes=3",
    "trainer.test_episodes=4", "engine.gradient=evolution", "engine.samples=2",
    "inner_opt=adam", "inner_opt.learn=[lr]",
)  # fmt: skip


def last(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = checkpoint.load(folder / "checkpoints" / "last.safetensors")
    del content[ELAPSED_FIELD]  # no two runs share it
    return content


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def test_a_longer_run_has_the_bits_that_it_would_have_had_from_the_start(
    metarun: Metarun, tmp_path: Path
) -> None:
    metarun("train", *SHORT, "trainer.steps=9", "hydra.run.dir=whole")
    metarun("train", *SHORT, "trainer.steps=5", "hydra.run.dir=done")
    shutil.copytree(tmp_path / "done", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    (tmp_path / "cut" / "status.json").write_text('{"status": "interrupted"}')
    earlier = (tmp_path / "done" / "result.json").read_bytes()

    longer = metarun("train", *SHORT, "trainer.steps=9", "hydra.run.dir=done")
    assert "done holds this run with 5 meta-steps: it goes on to 9" in longer.stderr
    assert "resuming after meta-step 5" in longer.stderr and "9 meta-steps" in longer.stdout
    assert (tmp_path / "done" / "result-5.json").read_bytes() == earlier
    metarun("train", *SHORT, "trainer.steps=9", "hydra.run.dir=cut")

    whole = last(tmp_path / "whole")
    for name in ("done", "cut"):
        found = last(tmp_path / name)
        for part in ("step", "meta", "outer_optimizer", "rng"):
            assert same(found[part], whole[part]), (name, part)
        assert found["planned_for"] == 5 and whole["planned_for"] == 9
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["steps"] == 9
    again = metarun("train", *SHORT, "trainer.steps=9", "hydra.run.dir=done")
    assert "finished: nothing to do" in again.stderr and again.stdout == longer.stdout
    logged = read_metrics(tmp_path / "done" / "metrics.jsonl")
    assert [r["step"] for r in logged if "train/loss" in r] == [3, 5, 6, 9]
    assert [r["step"] for r in logged if "val/loss" in r] == [2, 4, 5, 6, 8, 9]
    metarun("eval", "ckpt=done", "hydra.run.dir=eval")
    figures = json.loads((tmp_path / "eval" / "result.json").read_text())["test"]
    assert figures == json.loads((tmp_path / "done" / "result.json").read_text())["test"]
    reported = read_run(tmp_path / "done")
    assert reported.progress == "9/9" and reported.test is not None
    assert reported.test.value == figures["mse"]


def test_a_run_becomes_neither_shorter_nor_longer_against_its_schedule(
    metarun: Metarun, tmp_path: Path
) -> None:
    cosine = "outer_opt.schedule=cosine"
    metarun("train", *SHORT, "trainer.steps=2", cosine, "hydra.run.dir=run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = metarun("train", *SHORT, "trainer.steps=3", cosine, "hydra.run.dir=run", code=2)
    assert "outer_opt.schedule=cosine, whose learning rates depend on that number" in done.stderr
    done = metarun("train", *SHORT, "trainer.steps=1", cosine, "hydra.run.dir=run", code=2)
    assert "run holds a run of 2 meta-steps, which may become longer but not" in done.stderr
    done = metarun("train", *SHORT, "trainer.steps=3", "hydra.run.dir=run", code=2)
    assert "another config (outer_opt.schedule: cosine there, constant here" in done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_sweep_with_more_meta_steps_trains_its_runs_longer(
    metarun: Metarun, tmp_path: Path
) -> None:
    sweep = ("train", "-m", *SHORT, "hydra.sweep.dir=sweep")
    metarun(*sweep, "trainer.steps=2", "seed=0,1")
    longer = metarun(*sweep, "trainer.steps=3", "seed=0,1,2")
    assert "3 runs: 3 completed, 0 recalled, 0 failed" in longer.stdout
    for seed in range(3):
        folder = tmp_path / "sweep" / f"maml-sinusoid-s{seed}"
        assert json.loads((folder / "result.json").read_text())["steps"] == 3
        assert (folder / "result-2.json").exists() == (seed < 2)
    done = metarun(*sweep, "trainer.steps=2", "seed=0,1", code=2)
    assert "holds a run of 3 meta-steps, which may become longer but not shorter" in done.stderr


def test_a_run_keeps_the_plan_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "has_compiler", lambda: True)
    common = ["data=sinusoid", "backbone=mlp"]
    short, long = (
        config_of(*common, f"trainer.steps={steps}") for steps in (plan.LONG_RUN - 1, plan.LONG_RUN)
    )
    device = torch.device("cpu")
    first, whole = build(short, device), build(long, device)
    assert first.plan != whole.plan, "a long run is compiled"
    content = snapshot(first, fresh(first))
    grown = build(long, device, planned_for=content["planned_for"])
    assert grown.plan == first.plan
    again = snapshot(grown, fresh(grown))
    assert again["config"]["trainer"]["steps"] == plan.LONG_RUN
    assert again["planned_for"] == plan.LONG_RUN - 1, "also when it goes on once more"


def test_a_result_moves_aside_only_for_a_longer_run(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("{}")
    for steps, now in (("5", 9), (9, 9), (9, 5), (None, 5), (5, None)):
        keep_earlier_result(tmp_path, {"steps": steps}, now)
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    keep_earlier_result(tmp_path, {"steps": 5}, 9)
    assert [p.name for p in tmp_path.iterdir()] == ["result-5.json"]
    check_length({"trainer.steps": 5}, {"trainer.steps": 9}, tmp_path)
