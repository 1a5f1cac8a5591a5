"""What is logged, read back from the event files; the evaluation's arithmetic."""

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarun.components.algo.base import OBJECTIVES
from metarun.rundir.metrics import ELAPSED, read_metrics
from metarun.training.evaluation import Evaluation, confidence95
from metarun.training.loggers import Logged
from metarun.training.loggers.tensorboard import TensorBoard
from metarun.training.tracker import Tracker
from tests.conftest import Metarun


def test_tensorboard_has_the_curves_of_a_run(metarun: Metarun, tmp_path: Path) -> None:
    metarun(
        "train", "trainer.steps=4", "trainer.log_every=2", "trainer.eval_every=2",
        "trainer.meta_batch=2", "trainer.eval_episodes=4", "trainer.test_episodes=4",
        "backbone.width=4", "algo.inner_steps=2", "inner_opt.learn=[lr]",
        "inner_opt.granularity=step", "hydra.run.dir=run",
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {
        "train/loss", "train/accuracy", "val/accuracy", "val/ci95", "val/loss",
        "inner/loss_step0", "inner/loss_step1", "inner/lr_step0", "inner/lr_step1",
        "optim/grad_norm", "optim/lr", "time/tasks_per_s",
        "test/accuracy", "test/loss", "test/accuracy_by_inner_step", "test/loss_by_inner_step",
        "val/best_accuracy",
    }  # fmt: skip
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    logged = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert [step for step, _ in logged] == [2, 4]
    assert [v for _, v in logged] == pytest.approx(
        [r["train/loss"] for r in records if "train/loss" in r], rel=1e-6
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    curve = events.Scalars("test/accuracy_by_inner_step")
    assert [e.step for e in curve] == [0, 1, 2, 3]
    assert [e.value for e in curve] == pytest.approx(result["accuracy_per_inner_step"], rel=1e-6)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert len(list((tmp_path / "run" / "tb").iterdir())) == 1, "one event file, no child runs"


def tracker_of(directory: Path, start: int, last_eval: int, elapsed: float = 0.0) -> Tracker:
    """A tracker as `metarun train` makes it."""
    board = TensorBoard(Logged(directory, {"seed": 0}, "mse"))
    return Tracker(directory, start, last_eval, 10, elapsed, loggers=[board])


def test_resuming_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    with tracker_of(tmp_path, start=0, last_eval=0) as tracker:
        for step in (2, 4, 6):
            tracker.metrics(step, {"train/loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "tra')
    with tracker_of(tmp_path, start=4, last_eval=4) as tracker:
        tracker.metrics(6, {"train/loss": 60.0})
    records = [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert records == [(2, 2.0), (4, 4.0), (6, 60.0)]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == records


def test_an_attempt_from_the_start_replaces_the_one_before(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with tracker_of(tmp_path, start=0, last_eval=0) as tracker:
            tracker.metrics(1, {"train/loss": value})
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0)]
    assert [r["train/loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_a_validation_that_will_be_repeated_is_dropped(tmp_path: Path) -> None:
    """The checkpoint of step 4 is from before the validation of step 4."""
    with tracker_of(tmp_path, start=0, last_eval=0) as tracker:
        tracker.metrics(2, {"val/mse": 1.0})
        tracker.metrics(4, {"train/loss": 1.0})
        tracker.metrics(4, {"val/mse": 2.0})
    with tracker_of(tmp_path, start=4, last_eval=2) as tracker:
        tracker.metrics(4, {"val/mse": 3.0})
    values = [r["val/mse"] for r in read_metrics(tmp_path / "metrics.jsonl") if "val/mse" in r]
    assert values == [1.0, 3.0]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [e.value for e in events.Scalars("val/mse")] == [1.0, 3.0]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 1.0)]


def test_time_goes_on_where_the_earlier_attempt_left_it(tmp_path: Path) -> None:
    """What that attempt did after its checkpoint, at step 4, is lost and does not count."""
    times = {2: 500.0, 4: 1000.0, 6: 90000.0}
    lines = [{"step": step, "train/loss": 1.0, ELAPSED: time} for step, time in times.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    with tracker_of(tmp_path, start=4, last_eval=4) as tracker:
        assert 1000 <= tracker.elapsed() < 90000
    # Of meta-step 5 there is no line, but a checkpoint that counts its time.
    with tracker_of(tmp_path, start=5, last_eval=4, elapsed=2500.0) as tracker:
        assert 2500 <= tracker.elapsed() < 90000
        tracker.metrics(6, {"train/loss": 1.0})
    assert 1000 <= read_metrics(tmp_path / "metrics.jsonl")[-1][ELAPSED] < 90000


def test_a_speed_is_of_the_steps_since_the_last_and_leaves_out_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("metarun.training.tracker.time", clock)
    with tracker_of(tmp_path, start=0, last_eval=0) as tracker:
        for steps, seconds, validation in ((4, 2.0, 0.0), (6, 3.0, 50.0), (3, 6.0, 7.0)):
            for _ in range(steps):
                tracker.advance()
            now[0] += seconds
            with tracker.paused():
                now[0] += validation
            assert tracker.steps_per_second() == pytest.approx(steps / seconds)
        assert tracker.elapsed() == pytest.approx(2 + 3 + 6 + 50 + 7)


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    with tracker_of(tmp_path, start=0, last_eval=0) as tracker:
        tracker.metrics(1, {"val/ci95": float("nan"), "val/mse": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 1, "val/ci95": null, "val/mse": null, "time/elapsed_s": ')


def test_the_confidence_interval_is_students() -> None:
    torch.manual_seed(0)
    for count in (2, 5, 600):
        values = torch.rand(count, dtype=torch.float64)
        mean, error = values.mean().item(), stats.sem(values.numpy())
        low, high = stats.t.interval(0.95, count - 1, loc=mean, scale=error)
        assert confidence95(values) == pytest.approx((high - low) / 2, rel=1e-12)
    assert confidence95(torch.ones(1)) != confidence95(torch.ones(1))  # NaN: it has no spread


def test_an_evaluation_reports_the_last_inner_step() -> None:
    scores = torch.tensor([[0.2, 0.5], [0.2, 0.7], [0.5, 0.9]], dtype=torch.float64)
    figures = Evaluation(OBJECTIVES["classification"], scores, 1 - scores).summary()
    assert figures["accuracy"] == pytest.approx(0.7)
    assert figures["accuracy_per_inner_step"] == pytest.approx([0.3, 0.7])
    assert figures["accuracy_per_task"] == [0.5, 0.7, 0.9]
    assert (figures["episodes"], figures["inner_steps"]) == (3, 1)


def test_a_terminal_gets_a_bar_with_rate_loss_and_what_is_left(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "metarun", "train", "data=sinusoid", "backbone=mlp",
         "trainer.steps=400", "trainer.log_every=10", "trainer.eval_episodes=5",
         "trainer.test_episodes=5"],
        cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "400/400" in text and "step/s" in text and "loss=" in text and "mse=" in text
    assert "val mse" in text, "validations stay readable above the bar"
    assert "step 10/400" not in text, "the log lines are for where there is no bar"


def test_a_clock_that_goes_back_between_attempts_confuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads event files in the order of the times in their names."""
    now = 1_700_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    with tracker_of(tmp_path, start=0, last_eval=0) as tracker:
        for step in (2, 4, 6):
            tracker.metrics(step, {"train/loss": float(step)})
        tracker.final({"test/mse": 1.0}, {"test/mse_by_inner_step": [3.0, 2.0]}, 6)
    now -= 86_400
    with tracker_of(tmp_path, start=4, last_eval=4) as tracker:
        tracker.metrics(6, {"train/loss": 60.0})
        tracker.final({"test/mse": 1.5}, {"test/mse_by_inner_step": [4.0, 2.5]}, 6)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    logged = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert logged == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert [e.value for e in events.Scalars("test/mse_by_inner_step")] == [4.0, 2.5]
    assert all(now - 60 < e.wall_time <= now for e in events.Scalars("train/loss"))
    with tracker_of(tmp_path, start=6, last_eval=6):
        sizes = [path.stat().st_size for path in (tmp_path / "tb").iterdir()]
        assert sorted(map(bool, sizes)) == [False, True], "the file before is empty, others gone"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can measure the peak anew")
def test_the_peak_memory_is_that_of_the_run_not_of_the_process() -> None:
    """In a process of its own: another test may have told this one's allocator to keep memory."""
    code = (
        "import torch\n"
        "from metarun.training.result import forget_peak_memory, peak_memory_gib\n"
        "cpu = torch.device('cpu')\n"
        "large = torch.ones(2**27)\n"  # half a GiB
        "before = peak_memory_gib(cpu)\n"
        "del large\n"
        "forget_peak_memory(cpu)\n"
        "after = peak_memory_gib(cpu)\n"
        "assert after < before - 0.4, (before, after)\n"
    )
    # Started by a program that had more: Linux's ru_maxrss would go on from there.
    starter = (
        "import os, sys\n"
        "large = b'x' * 2**30\n"
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])\n"
    )
    subprocess.run([sys.executable, "-c", starter, code], check=True)
