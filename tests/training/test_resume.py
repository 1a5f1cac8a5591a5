"""Interrupted runs: real processes, real signals, the bits of an undisturbed run."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarun.rundir import checkpoint
from metarun.rundir.metrics import read_metrics
from metarun.system.interrupts import Aborted, Interrupted, Interruption
from tests.forking import Fork, Forks

STEPS = 60
TRAIN = [
    "train", "data=sinusoid", "backbone=mlp", "inner_opt=adam",
    "inner_opt.learn=[lr]", "inner_opt.granularity=parameter_step", "outer_opt.schedule=cosine",
    "outer_opt.clip_norm=5", f"trainer.steps={STEPS}", "trainer.eval_every=14",
    "trainer.checkpoint_every=7", "trainer.log_every=5", "trainer.eval_episodes=100",
    "trainer.test_episodes=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(forks: Forks) -> Callable[[Path], Fork]:
    """What starts the run in a folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("METARUN_", "HYDRA_"))}
    environment = kept | {"OMP_NUM_THREADS": "1"}
    return lambda run: forks.start([*TRAIN, f"hydra.run.dir={run}"], run.parent, environment)


def ended(process: Fork) -> str:
    """What it has said, once it has ended well."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def wait_for_step(folder: Path, step: int, process: Fork) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
        if steps and max(steps) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def bits(folder: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(folder / "checkpoints" / "last.safetensors")
    assert content["step"] == STEPS
    return content["meta"]


def metrics(folder: Path) -> list[dict[str, float]]:
    """All that was logged, but for the speed, which no two runs share."""
    return [
        {k: v for k, v in record.items() if not k.startswith("time/")}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    ours, expected = bits(folder), bits(undisturbed)
    assert set(ours) == set(expected) and len(expected) > 6
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name
    assert metrics(folder) == metrics(undisturbed)
    results = [json.loads((f / "result.json").read_text()) for f in (folder, undisturbed)]
    assert results[0]["test"] == results[1]["test"] and results[0]["best"] == results[1]["best"]
    events = EventAccumulator(str(folder / "tb")).Reload()
    for tag in ("train/loss", "val/mse", "inner/loss_step0"):
        logged = {e.step: e.value for e in events.Scalars(tag)}
        assert len(logged) == len(events.Scalars(tag)), "a step appears twice"
        assert logged == {
            r["step"]: pytest.approx(r[tag], rel=1e-6) for r in metrics(undisturbed) if tag in r
        }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, start: Callable[[Path], Fork]) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended(start(folder))
    return folder


@pytest.mark.parametrize("kills", [(6,), (20, 33, 55)])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, start: Callable[[Path], Fork], undisturbed: Path, kills: tuple[int, ...]
) -> None:
    folder = tmp_path / "run"
    delays = random.Random(sum(kills))
    for step in kills:
        process = start(folder)
        wait_for_step(folder, step, process)
        time.sleep(delays.uniform(0, 0.02))  # so that it dies anywhere within a step
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert json.loads((folder / "status.json").read_text())["status"] == "running"
    ended(start(folder))
    assert_same_run(folder, undisturbed)
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "completed" and status["attempts"] == len(kills) + 1
    provenance = json.loads((folder / "provenance.json").read_text())
    assert len(provenance["earlier_attempts"]) == len(kills)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_of_its_last_step(
    tmp_path: Path, start: Callable[[Path], Fork], undisturbed: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_step(folder, 10, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"interrupted by {number.name} after meta-step" in errors
    assert "to go on: metarun train data=sinusoid" in errors and "Traceback" not in errors
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    content = checkpoint.load(folder / "checkpoints" / "last.safetensors")
    saved, seconds = content["step"], content["elapsed_s"]
    assert f"after meta-step {saved};" in errors and saved >= 10 and seconds > 0
    # All of its time counts, with that since the last line of the log.
    checkpoint.save(folder / "checkpoints", content | {"elapsed_s": seconds + 5000}, 3, None)
    assert f"resuming after meta-step {saved}" in ended(start(folder))
    assert_same_run(folder, undisturbed)
    result = json.loads((folder / "result.json").read_text())
    assert 5000 + seconds < result["train_seconds"] < 10000


def test_a_damaged_newest_checkpoint_costs_time_only(
    tmp_path: Path, start: Callable[[Path], Fork], undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_step(folder, 40, process)
    process.kill()
    process.communicate()
    last = folder / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train/lo')
    assert "trying the one before" in ended(start(folder))
    assert_same_run(folder, undisturbed)


def test_lines_that_the_log_lost_from_before_the_checkpoint_are_logged_again(
    tmp_path: Path, start: Callable[[Path], Fork], undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_step(folder, 40, process)
    process.kill()
    process.communicate()
    saved = checkpoint.load(folder / "checkpoints" / "last.safetensors")["step"]
    log = folder / "metrics.jsonl"
    kept = [r for r in read_metrics(log) if r["step"] <= saved]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    log.write_bytes(text.encode()[:-30] + bytes(30))  # as a power cut may leave it
    lost = f"lacks lines from before meta-step {saved}: going back to meta-step {saved - 7}"
    assert lost in ended(start(folder))
    assert_same_run(folder, undisturbed)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, start: Callable[[Path], Fork], undisturbed: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    while not (folder / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    ended(start(folder))
    assert_same_run(folder, undisturbed)


def test_a_second_signal_stops_at_once_and_saves_nothing() -> None:
    """It may come in the middle of a step, whose half must not get into a checkpoint."""
    with Interruption() as stop:
        with pytest.raises(Aborted), stop.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert not issubclass(Aborted, Interrupted)
    with Interruption() as stop:
        reached = []
        with pytest.raises(Interrupted, match="SIGTERM"), stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            reached.append("the end of the step")
            stop.check()
        assert reached
    with Interruption(), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)  # outside of `deferred` it acts at once
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_processes_do_not_share_a_run(tmp_path: Path, start: Callable[[Path], Fork]) -> None:
    folder = tmp_path / "run"
    first = start(folder)
    wait_for_step(folder, 5, first)
    first.send_signal(signal.SIGSTOP)
    second = start(folder)
    _, errors = second.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and "another process is running in" in errors
    assert f"process {first.pid} on {socket.gethostname()}" in errors
    first.communicate(timeout=120)
    assert first.returncode == 0
