"""Launchers and the search: real processes, real signals, the bits of undisturbed runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from metarun.config import launchers
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.sweeps.job import requeued_not_failed
from metarun.sweeps.search import distribution
from metarun.system import interrupts
from metarun.system.files import LockedError, locked
from metarun.system.interrupts import Interruption, Preempted
from tests.cli.test_cli import SHORT
from tests.conftest import Metarun
from tests.forking import Fork, Forks

LONG = (
    "data=sinusoid", "backbone=mlp", "inner_opt=adam", "inner_opt.learn=[lr]",
    "trainer.steps=300", "trainer.eval_every=1000", "trainer.checkpoint_every=100000",
    "trainer.log_every=5", "trainer.eval_episodes=10", "trainer.test_episodes=10",
)  # fmt: skip


def assert_same_bits(run: Path, undisturbed: Path) -> None:
    ours, expected = (
        checkpoint.load(folder / "checkpoints" / "last.safetensors")
        for folder in (run, undisturbed)
    )
    assert ours["step"] == expected["step"] and set(ours["meta"]) == set(expected["meta"])
    assert all(torch.equal(ours["meta"][k], expected["meta"][k]) for k in expected["meta"])
    tests = [json.loads((f / "result.json").read_text())["test"] for f in (run, undisturbed)]
    assert tests[0] == tests[1]


def worker(run: Path, client: Fork) -> int:
    """The process of a run that has logged a few meta-steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and client.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            return int(json.loads((run / "provenance.json").read_text())["pid"])
        time.sleep(0.01)
    raise AssertionError(f"{run} did not start: {client.communicate()}")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_joblib_runs_what_the_local_launcher_runs(metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from dataclasses import dataclass\n"
        "from metarun.components.backbone.mlp import MLP\n"
        "from metarun.components.build import register\n"
        "@dataclass\n"
        "class WideConfig:\n"
        "    name: str = 'wide'\n"
        "register('backbone', 'wide', WideConfig, lambda shape, outputs: MLP(shape, outputs))\n"
    )
    short = [argument for argument in SHORT if argument != "backbone=mlp"]
    arguments = [*short, "+plugins=[nets]", "backbone=wide"]
    metarun("train", *arguments, "hydra.run.dir=alone")
    done = metarun(
        "train", "-m", *arguments, "hydra/launcher=joblib", "inner_opt.lr=1e30,0.02",
        "hydra.sweep.dir=sweep", code=1,
    )  # fmt: skip
    assert "2 runs: 1 completed, 0 recalled, 1 failed" in done.stdout
    assert "maml-sinusoid-s0_inner_opt.lr-1e+30 (inner_opt.lr=1e+30)" in done.stderr
    assert_same_bits(tmp_path / "sweep" / "maml-sinusoid-s0_inner_opt.lr-0.02", tmp_path / "alone")


DEADLY = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from metarun.components.backbone.mlp import MLP
from metarun.components import register

@dataclass
class DeadlyConfig:
    name: str = "deadly"
    deadly: bool = False

def build(shape, outputs, deadly):
    while deadly:
        time.sleep(0.01)
        if any('"completed"' in path.read_text() for path in Path("sweep").glob("*/status.json")):
            os.kill(os.getpid(), signal.SIGKILL)
    return MLP(shape, outputs)

register("backbone", "deadly", DeadlyConfig, build)
"""


def test_a_dead_worker_of_joblib_leaves_no_run_unmentioned(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(DEADLY)
    short = [argument for argument in SHORT if argument != "backbone=mlp"]
    done = metarun(
        "train", "-m", *short, "+plugins=[nets]", "backbone=deadly", "backbone.deadly=true,false",
        "hydra/launcher=joblib", "hydra.sweep.dir=sweep", code=1,
    )  # fmt: skip
    assert "2 runs: 1 completed, 0 recalled, 1 failed" in done.stdout
    assert "(backbone.deadly=True): the launcher gave up: TerminatedWorkerError" in done.stderr
    assert "to go on: metarun train" in done.stderr


def test_sigterm_ends_the_workers_of_joblib(
    tmp_path: Path, environment: dict[str, str], forks: Forks
) -> None:
    command = [
        "train", "-m", *LONG, "trainer.steps=100000", "engine.compile=none", "seed=0,1",
        "hydra/launcher=joblib", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    client = forks.start(command, tmp_path, environment)
    runs = [tmp_path / "sweep" / f"maml-sinusoid-s{seed}" for seed in (0, 1)]
    for run in runs:
        worker(run, client)
        with pytest.raises(LockedError), locked(run / ".lock"):
            pass
    client.terminate()
    errors = client.communicate(timeout=120)[1]
    assert client.returncode == 130
    assert "metarun: interrupted by SIGTERM\nto go on: metarun train -m" in errors
    for run in runs:
        with locked(run / ".lock"):  # which goes with its process
            pass


def test_preempted_runs_are_requeued_and_killed_ones_reported(
    metarun: Metarun, tmp_path: Path, environment: dict[str, str], forks: Forks
) -> None:
    for seed in (0, 1):
        metarun("train", *LONG, f"seed={seed}", f"hydra.run.dir=undisturbed{seed}")
    command = [
        "train", "-m", *LONG, "seed=0,1", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    client = forks.start(command, tmp_path, environment)
    sweep = tmp_path / "sweep"
    runs = [sweep / f"maml-sinusoid-s{seed}" for seed in (0, 1)]
    os.kill(worker(runs[0], client), signal.SIGUSR2)
    doomed = worker(runs[1], client)
    os.kill(doomed, signal.SIGTERM)  # the warning of a cluster that kills without SIGUSR2
    wait_for(runs[1] / "checkpoints" / "last.safetensors")
    os.kill(doomed, signal.SIGKILL)
    output, errors = client.communicate(timeout=240)
    assert client.returncode == 1, errors
    assert "2 runs: 1 completed, 0 recalled, 1 failed" in output
    assert "sweep/maml-sinusoid-s1 (seed=1): job " in errors and "died" in errors

    logs = "".join(log.read_text() for log in sweep.glob(".submitit/*/*/*_log.err"))
    assert "interrupted by SIGUSR2 after meta-step" in logs and "Requeued job" in logs
    assert "resuming after meta-step" in logs
    assert json.loads((runs[0] / "status.json").read_text())["attempts"] == 2
    assert_same_bits(runs[0], tmp_path / "undisturbed0")

    again = metarun(*command)
    assert "2 runs: 1 completed, 1 recalled, 0 failed" in again.stdout
    logs = "".join(log.read_text() for log in sweep.glob(".submitit/*/*/*_log.err"))
    assert logs.count("resuming after meta-step") == 2, "the checkpoint of the warning was lost"
    assert_same_bits(runs[1], tmp_path / "undisturbed1")


def test_a_search_goes_on_where_it_was(metarun: Metarun, tmp_path: Path) -> None:
    command = (
        "train", "-m", *SHORT, "hydra/sweeper=optuna", "hydra.sweep.dir=sweep",
        "inner_opt.lr=tag(log,interval(0.001,0.1))", "task.shot=5,10",
    )  # fmt: skip
    metarun(*command, "hydra.sweeper.n_trials=2")
    done = metarun(*command, "hydra.sweeper.n_trials=3")
    assert "3 runs: 1 completed, 2 recalled, 0 failed" in done.stdout
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    runs = list((tmp_path / "sweep").glob("*/result.json"))
    scores = {p.parent.name: json.loads(p.read_text())["best"]["score"] for p in runs}
    assert len(scores) == best.trials == 3
    assert best.best_evaluated_value == min(scores.values()), "an error is to be small"
    assert best.best_run == min(scores, key=scores.__getitem__)
    assert f"best of 3 trials: validation score {best.best_evaluated_value:.6g}" in done.stdout

    failing = metarun(
        "train", "-m", *SHORT, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3",
        "inner_opt.lr=1e30,1e31", "hydra.sweep.dir=bad", code=1,
    )  # fmt: skip
    assert "0 completed" in failing.stdout and "no trial came to an end" in failing.stderr


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a=interval(0.01,1)", FloatDistribution(0.01, 1.0)),
        ("a=tag(log,interval(0.01,1))", FloatDistribution(0.01, 1.0, log=True)),
        ("a=int(interval(1,9))", IntDistribution(1, 9)),
        ("a=range(1,6)", IntDistribution(1, 5)),
        ("a=range(1,6,2)", IntDistribution(1, 5, step=2)),
        ("a=range(0.5,2,0.5)", CategoricalDistribution([0.5, 1.0, 1.5])),
        ("a=x,1,[2]", CategoricalDistribution(["x", "1", "[2]"])),
    ],
)
def test_a_search_space_is_written_in_hydras_grammar(text: str, meaning: BaseDistribution) -> None:
    assert distribution(OverridesParser.create().parse_override(text)) == meaning


@pytest.mark.parametrize("text", ["a=interval(1,0.1)", "a=tag(log,interval(0,1))"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an interval"):
        distribution(OverridesParser.create().parse_override(text))


def test_a_search_for_nothing_is_refused(metarun: Metarun) -> None:
    search = ("train", "-m", *SHORT, "hydra/sweeper=optuna", "seed=0")
    done = metarun(*search, code=2)
    assert "nothing to search" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("choice", sorted(launchers.NEEDS))
def test_a_missing_package_is_named_with_its_extra(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers.check_installed([choice])
    monkeypatch.setattr(launchers, "find_spec", lambda module: None)
    extra = launchers.NEEDS[choice][1]
    with pytest.raises(ConfigError, match=rf"{choice} needs .*pip install 'metarun\[{extra}\]'"):
        launchers.check_installed(["seed=0", choice])


def test_slurm_without_slurm_is_refused(metarun: Metarun, tmp_path: Path) -> None:
    here = str(Path(sys.executable).parent)  # and no srun in it
    done = metarun("train", "-m", *SHORT, "hydra/launcher=submitit_slurm", code=1, PATH=here)
    assert 'Could not detect "srun"' in done.stderr and len(done.stderr.splitlines()) == 1


def test_submitit_signals_mean_what_clusters_mean_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    requeued = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert interrupts.preemption_signal() is None, "nobody handles it: not submitit's process"
    before = signal.signal(signal.SIGUSR2, lambda *_: requeued.append(True))
    try:
        with pytest.raises(Preempted), Interruption() as stop, stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            stop.check()  # a warning, no end
            assert stop.save_wanted() and not stop.save_wanted()
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
            assert not requeued
            stop.check()
        signal.raise_signal(signal.SIGUSR2)
        assert requeued, "submitit's handler is back"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_requeue_that_dies_with_its_job_is_no_failure() -> None:
    def fail(code: int, *command: str) -> None:
        with requeued_not_failed():
            raise subprocess.CalledProcessError(code, list(command))

    with pytest.raises(SystemExit):
        fail(-signal.SIGTERM, "scontrol", "requeue", "1_0")
    with pytest.raises(subprocess.CalledProcessError):
        fail(1, "scontrol", "requeue", "1_0")
    with pytest.raises(subprocess.CalledProcessError):
        fail(-signal.SIGTERM, "git", "status")
