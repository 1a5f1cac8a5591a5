"""Sweeps on the command line: names, what is run again, what a failure does."""

import json
import signal
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from metarun.config.compose import register_schemas
from metarun.errors import ConfigError
from metarun.rundir import SWEEP_FILE
from metarun.sweeps import job
from metarun.sweeps.sweep import NAME_LENGTH, Job, _recalled, run_name
from metarun.training import run as train
from tests.cli.test_cli import SHORT, files
from tests.conftest import Metarun
from tests.forking import Forks

register_schemas()


def name(varying: list[str], *overrides: str) -> str:
    with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
        cfg = compose(config_name="train", overrides=list(overrides))
    return run_name("base", cfg, overrides, varying)


def test_a_run_is_named_after_the_values_that_vary() -> None:
    assert name(["inner_opt.lr"], "seed=1", "inner_opt.lr=0.4") == "base_inner_opt.lr-0.4"
    same = {name(["inner_opt.lr"], f"inner_opt.lr={text}") for text in ("0.1", "1e-1", "0.10")}
    assert same == {"base_inner_opt.lr-0.1"}
    assert name(["inner_opt"], "inner_opt=adam") == "base_inner_opt-adam"
    assert name(["experiment"], "experiment=demo") == "base_experiment-demo"


def test_names_are_fit_for_paths_and_differ_where_values_do() -> None:
    key = "backbone.hidden"
    lists = [name([key], "backbone=mlp", f"{key}=[{text}]") for text in ("4,0", "40", "4,0,0")]
    texts = [f"algo.adapt=['{'a' * 200}{end}']" for end in "xy"]
    long = [name(["algo.adapt"], text) for text in texts]
    for names in (lists, long):
        assert len(set(names)) == len(names)
        for each in names:
            assert not set(each) & set("=,[]' /\\") and len(each) <= NAME_LENGTH


def test_a_sweep_given_again_runs_only_what_is_missing(metarun: Metarun, tmp_path: Path) -> None:
    sweep = ("train", "-m", *SHORT, "hydra.sweep.dir=sweep")
    first = metarun(*sweep, "inner_opt.lr=0.01,0.02")
    assert "2 runs: 2 completed, 0 recalled, 0 failed" in first.stdout
    folder = tmp_path / "sweep"
    runs = [folder / f"maml-sinusoid-s0_inner_opt.lr-{lr}" for lr in ("0.01", "0.02", "0.03")]
    (runs[1] / "result.json").unlink()  # as if it had been killed at its test
    before = files(runs[0])
    done = metarun(*sweep, "inner_opt.lr=0.03,2e-2,0.01")
    assert "3 runs: 2 completed, 1 recalled, 0 failed" in done.stdout
    assert files(runs[0]) == before
    assert all((run / "result.json").exists() for run in runs)
    assert json.loads((runs[1] / "status.json").read_text())["attempts"] == 2
    record = json.loads((folder / "sweep.json").read_text())
    assert [record["runs"][run.name]["status"] for run in runs] == [
        "recalled", "completed", "completed",
    ]  # fmt: skip
    assert record["code"]["version"]

    before = files(folder)
    refused = metarun(*sweep, "inner_opt.lr=0.01,0.02", "algo.order=1", code=2)
    assert "holds a run of another config (algo.order: 2 there, 1 here)" in refused.stderr
    assert files(folder) == before


def test_a_failed_run_stops_no_other_and_is_listed(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun(
        "train", "-m", *SHORT, "inner_opt.lr=1e30,0.02", "task.shot=5,0",
        "hydra.sweep.dir=sweep", code=1,
    )  # fmt: skip
    assert "4 runs: 1 completed, 0 recalled, 3 failed" in done.stdout
    listed = [line for line in done.stderr.splitlines() if line.startswith("  sweep/")]
    assert len(listed) == 3
    nan = "sweep/maml-sinusoid-s0_inner_opt.lr-1e+30_task.shot-5 (inner_opt.lr=1e+30 task.shot=5): "
    assert any(nan in line and "NaN" in line for line in listed)
    assert sum("task.shot=0: must be from 1 to" in line for line in listed) == 2
    assert "to go on: metarun train -m data=sinusoid" in done.stderr
    (good,) = (tmp_path / "sweep").glob("*/result.json")
    assert good.parent.name.endswith("lr-0.02_task.shot-5")


def test_a_sweep_of_which_nothing_can_start_is_a_wrong_command(
    metarun: Metarun, tmp_path: Path
) -> None:
    done = metarun("train", "-m", *SHORT, "task.shot=0,-1", code=2)
    assert (
        done.stderr.startswith("metarun: task.shot=0: must be from 1")
        and done.stderr.count("\n") == 1
    )
    shared = metarun("train", "-m", *SHORT, "seed=0,1", "hydra.sweep.subdir=x", code=2)
    assert "two runs of this sweep would share" in shared.stderr
    unknown = metarun("train", "-m", *SHORT, "seeds=0,1", code=2)
    assert "no setting 'seeds'" in unknown.stderr
    assert files(tmp_path) == {}


def test_an_interrupted_sweep_says_how_to_go_on_and_does(
    tmp_path: Path, environment: dict[str, str], forks: Forks, metarun: Metarun
) -> None:
    command = [
        "train", "-m", "data=sinusoid", "backbone=mlp",
        "trainer.steps=300", "trainer.eval_every=1000", "trainer.checkpoint_every=1000",
        "trainer.log_every=5", "trainer.eval_episodes=10", "trainer.test_episodes=10",
        "seed=0,1", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    metrics = tmp_path / "sweep" / "maml-sinusoid-s0" / "metrics.jsonl"
    process = forks.start(command, tmp_path, environment)
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted by SIGINT after meta-step" in errors
    assert errors.count("to go on: metarun train -m data=sinusoid") == 1
    assert not (tmp_path / "sweep" / "maml-sinusoid-s1" / "status.json").exists()
    done = metarun(*command)
    assert "resuming after meta-step" in done.stderr
    assert "2 runs: 2 completed, 0 recalled, 0 failed" in done.stdout


def test_other_code_than_was_launched_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / SWEEP_FILE
    assert not job._code_differs(tmp_path)  # nobody knows
    record.write_text(json.dumps({"code": job.code_state()}))
    assert not job._code_differs(tmp_path)
    record.write_text(json.dumps({"code": {"version": "0.0.1", "git": None}}))
    assert job._code_differs(tmp_path)
    assert "other code than was launched" in caplog.text


def test_a_directory_with_traces_of_another_run_is_refused(tmp_path: Path) -> None:
    planned = Job([], tmp_path, {"seed": 1, "outer_opt": {"lr": 0.05}})
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1\nouter_opt:\n  lr: 0.001\n")
    assert _recalled(planned) is None, "launched but never started: nothing is lost"
    for trace in ("status.json", "metrics.jsonl"):
        (tmp_path / trace).write_text("")  # as a power cut leaves it
        with pytest.raises(ConfigError, match=r"outer_opt\.lr: 0.001 there, 0.05 here"):
            _recalled(planned)
        (tmp_path / trace).unlink()
    config.unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="not a run of ours"):
        _recalled(planned)


def test_a_run_whose_result_is_damaged_is_not_recalled(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "status.json").write_text('{"status": "completed"}')
    (tmp_path / "result.json").write_text('{"test": {}, "best": null, "steps": 20}')
    assert _recalled(Job([], tmp_path, {"seed": 1})) is None


def test_checkpoints_of_another_config_are_refused() -> None:
    here = {"outer_opt": {"lr": 0.05}, "data": {"root": "a"}}
    train._check_resumed({"outer_opt": {"lr": 0.05}, "data": {"root": "b"}}, here, Path("r"))
    with pytest.raises(ConfigError, match=r"another config .outer_opt\.lr: 5 there, 0.05 here"):
        train._check_resumed({"outer_opt": {"lr": 5}, "data": {"root": "a"}}, here, Path("r"))


def test_a_directory_that_cannot_be_used_stops_no_other_run(
    metarun: Metarun, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "maml-sinusoid-s0").write_text("in the way")
    earlier = {"status": "failed", "error": "of an earlier call"}
    (folder / "sweep.json").write_text(json.dumps({"runs": {"old": earlier, "gone": {}}}))
    done = metarun("train", "-m", *SHORT, "seed=0,1", "hydra.sweep.dir=sweep", code=1)
    assert "2 runs: 1 completed, 0 recalled, 1 failed" in done.stdout
    assert "sweep/maml-sinusoid-s0 (seed=0): cannot write to" in done.stderr
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    assert runs.pop("old") == earlier
    assert {name: run["status"] for name, run in runs.items()} == {
        "maml-sinusoid-s0": "failed", "maml-sinusoid-s1": "completed",
    }  # fmt: skip
    outside = f"hydra.sweep.subdir={tmp_path}/x-${{seed}}"
    refused = metarun("train", "-m", *SHORT, "seed=0,1", outside, "hydra.sweep.dir=sweep", code=2)
    assert "must be a path within hydra.sweep.dir" in refused.stderr
