"""Several processes for one run: real torchrun, real gloo, the figures of a single process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from metarun.rundir import checkpoint
from metarun.rundir.metrics import read_metrics
from metarun.system.ranks import Ranks
from tests.forking import Fork, Forks

STEPS = 160
TRAIN = [
    "train", "data=sinusoid", "backbone=mlp", "inner_opt.learn=[lr]", "trainer.meta_batch=5",
    f"trainer.steps={STEPS}", "trainer.eval_every=40", "trainer.checkpoint_every=20",
    "trainer.log_every=5", "trainer.eval_episodes=10", "trainer.test_episodes=7",
    "outer_opt.schedule=cosine", "outer_opt.clip_norm=1", "engine.chunk=2",
    "engine.precision=float64", "hydra.run.dir=run",
]  # fmt: skip
FAULTS = """
import os
from dataclasses import dataclass

import torch
from metarun.components.backbone.mlp import MLP
from metarun.components import register

class Odd(MLP):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.fault = os.environ["FAULT"] if os.environ["RANK"] == "1" else ""
        self.calls = 0
        if self.fault == "build":
            raise ValueError("no such network")
        if self.fault == "other numbers":
            with torch.no_grad():
                next(self.parameters()).add_(1)

    def forward(self, x):
        self.calls += 1
        if self.fault == "compute" and self.calls == 50:
            raise RuntimeError("a broken GPU")
        return super().forward(x)

@dataclass
class OddConfig:
    name: str = "odd"

register("backbone", "odd", OddConfig, Odd)
"""

DROPOUT = """
from dataclasses import dataclass

from torch import nn
from metarun.components.backbone.mlp import MLP
from metarun.components import register

def noisy(*args):
    model = MLP(*args)
    model.body.append(nn.Dropout(0.3))
    return model

@dataclass
class NoisyConfig:
    name: str = "noisy"

register("backbone", "noisy", NoisyConfig, noisy)
"""


HOLES = """
from dataclasses import dataclass

from metarun.components import register
from metarun.components.data.sinusoid import Sinusoids

class Holed(Sinusoids):
    def sample(self, split, start, count):
        episodes = super().sample(split, start, count)
        holes = [i for i in range(count) if split == "train" and (start + i) % 37 == 4]
        episodes.query_y[holes] = float("nan")
        return episodes

@dataclass
class HoledConfig:
    name: str = "holed"

def build(task, seed, device, dtype):
    return Holed(shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)

register("data", "holed", HoledConfig, build)
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("METARUN_", "HYDRA_"))}
    return kept | {"OMP_NUM_THREADS": "1", "METARUN_CACHE": str(tmp_path_factory.mktemp("cache"))}


Process = subprocess.Popen[str] | Fork


def start(folder: Path, env: dict[str, str], *more: str, restarts: int = 0) -> Process:
    """A run of two ranks in `folder`/run, by torchrun."""
    by_torchrun = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *by_torchrun, "-m", "metarun", *TRAIN, *more],
        env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ranks_of(
    forks: Forks, count: int, folder: Path, env: dict[str, str], *arguments: str
) -> list[Fork]:
    """Ranks without torchrun, whose exit statuses can be seen; one alone is an ordinary run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    place["LOCAL_WORLD_SIZE"] = str(count)
    return [
        forks.start(arguments, folder, env | (place | own if count > 1 else {}))
        for own in ({"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count))
    ]


def finish(process: Process, code: int = 0) -> tuple[str, str]:
    """Its stdout and stderr; torchrun adds words of its own."""
    output, errors = process.communicate(timeout=200)
    assert process.returncode == code, output + errors
    return output, errors


def train(forks: Forks, count: int, folder: Path, env: dict[str, str], *more: str) -> None:
    """A run of so many ranks in `folder`/run."""
    for rank in ranks_of(forks, count, folder, env, *TRAIN, *more):
        finish(rank)


def rank_pid(process: Process, rank: int) -> int:
    """The process of a rank, among the children of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"rank {rank} is not among {children}")


def wait_until(process: Process, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def reached(folder: Path, step: int) -> Callable[[], bool]:
    path = folder / "run" / "metrics.jsonl"
    return lambda: any(record["step"] >= step for record in read_metrics(path))


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "run" / "checkpoints" / "last.safetensors")


def status(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run" / "status.json").read_text())


def result(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "run" / "result.json").read_text())


def assert_close(folder: Path, other: Path, tolerance: float) -> None:
    """The same run up to rounding: parameters, all that was logged, the final figures."""
    ours, theirs = last_checkpoint(folder), last_checkpoint(other)
    assert ours["step"] == theirs["step"] and len(ours["meta"]) == 7
    for name, value in theirs["meta"].items():
        torch.testing.assert_close(ours["meta"][name], value, rtol=tolerance, atol=tolerance)
    logged = [read_metrics(f / "run" / "metrics.jsonl") for f in (folder, other)]
    for record, expected in zip(*logged, strict=True):
        assert record.keys() == expected.keys()
        for tag in record.keys() - {"time/tasks_per_s", "time/elapsed_s"}:
            close = pytest.approx(expected[tag], rel=10 * tolerance, abs=tolerance)
            assert record[tag] == close, (tag, record["step"])
    tests = [result(f)["test"] for f in (folder, other)]
    assert tests[0]["mse_per_task"] == pytest.approx(tests[1]["mse_per_task"], rel=10 * tolerance)
    assert tests[0]["episodes"] == tests[1]["episodes"] == len(tests[0]["mse_per_task"])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], forks: Forks) -> Path:
    """An undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("single")
    train(forks, 1, folder, env)
    return folder


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Path:
    """An undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("double")
    output, errors = finish(start(folder, env))
    assert output.count("test mse") == 1 and errors.count(f"step {STEPS}/{STEPS}  loss") == 1
    assert "rank 0 of 2" in errors
    return folder


def test_two_ranks_find_what_one_does(single: Path, double: Path) -> None:
    assert_close(double, single, 1e-12)
    assert [p.name for p in double.iterdir()] == ["run"]
    assert len(list((double / "run" / "tb").iterdir())) == 1
    assert result(double)["ranks"] == 2
    provenance = json.loads((double / "run" / "provenance.json").read_text())
    assert provenance["ranks"] == 2 and provenance["argv"][0].startswith("torchrun")


def test_so_do_three(tmp_path: Path, env: dict[str, str], single: Path, forks: Forks) -> None:
    train(forks, 3, tmp_path, env)  # of whose shares one is smaller
    assert_close(tmp_path, single, 1e-12)


def test_in_single_precision_and_without_a_directory_given(
    tmp_path: Path, env: dict[str, str], forks: Forks
) -> None:
    settings = ["engine.precision=float32", "trainer.steps=40", "hydra.run.dir=at/${now:%S-%f}"]
    folders = [tmp_path / "one", tmp_path / "two"]
    for ranks, folder in enumerate(folders, start=1):
        folder.mkdir()
        train(forks, ranks, folder, env, "engine.chunk=null", *settings)
        (made,) = (folder / "at").iterdir()
        made.rename(folder / "run")
    assert_close(folders[1], folders[0], 1e-6)


def test_a_run_is_interrupted_and_goes_on_with_other_numbers_of_ranks(
    tmp_path: Path, env: dict[str, str], single: Path, forks: Forks
) -> None:
    def by_forks(count: int) -> list[Process]:
        return [*ranks_of(forks, count, tmp_path, env, *TRAIN)]

    for ranks, step, starts in (
        (1, 5, lambda: by_forks(1)),
        (2, 40, lambda: [start(tmp_path, env)]),
        (2, 80, lambda: by_forks(2)),
    ):
        processes = starts()
        wait_until(processes[0], reached(tmp_path, step))
        os.kill(processes[-1].pid, signal.SIGTERM)  # torchrun, or the last rank
        by_torchrun = len(processes) < ranks
        code = 1 if by_torchrun else 130
        errors = "".join(finish(process, code)[1] for process in processes)
        assert errors.count("metarun: interrupted by SIGTERM after meta-step") == 1, errors
        assert errors.count("to go on: ") == 1 and "hydra.run.dir=run" in errors
        assert ("--nproc-per-node=2 -m metarun train" in errors) == (ranks == 2)
        assert f"after meta-step {last_checkpoint(tmp_path)['step']};" in errors
        assert status(tmp_path)["status"] == "interrupted"
    train(forks, 1, tmp_path, env)
    assert_close(tmp_path, single, 1e-12)


def test_a_dead_rank_ends_the_run_and_a_rerun_finds_the_same_bits(
    tmp_path: Path, env: dict[str, str], double: Path, forks: Forks
) -> None:
    process = start(tmp_path, env)
    wait_until(process, reached(tmp_path, 25))
    os.kill(rank_pid(process, 1), signal.SIGKILL)
    _, errors = finish(process, 1)
    assert errors.count("metarun: lost another rank of this run: it has died after") == 1, errors
    assert "hydra.run.dir=run goes on from there" in errors
    assert status(tmp_path)["status"] == "failed"
    assert "lost another rank" in str(status(tmp_path)["error"])
    first, second = ranks_of(forks, 2, tmp_path, env, *TRAIN)
    (_, errors), _ = finish(first), finish(second)
    assert "resuming after meta-step" in errors
    ours, expected = last_checkpoint(tmp_path), last_checkpoint(double)
    assert ours["step"] == expected["step"] == STEPS
    for name, value in expected["meta"].items():
        assert torch.equal(ours["meta"][name], value), name
    assert result(tmp_path)["test"] == result(double)["test"]
    assert_close(tmp_path, double, 0)


def test_torchrun_may_start_a_run_with_a_dead_rank_anew(
    tmp_path: Path, env: dict[str, str], double: Path
) -> None:
    process = start(tmp_path, env, restarts=1)
    wait_until(process, reached(tmp_path, 25))
    os.kill(rank_pid(process, 1), signal.SIGKILL)
    _, errors = finish(process)
    assert "lost another rank" in errors and "resuming after meta-step" in errors
    assert "cannot reach" not in errors
    assert status(tmp_path)["attempts"] == 2
    assert_close(tmp_path, double, 0)


def test_masks_of_dropout_are_those_of_an_undisturbed_run(
    tmp_path: Path, env: dict[str, str], forks: Forks
) -> None:
    (tmp_path / "noisy.py").write_text(DROPOUT)
    settings = ["+plugins=[noisy]", "backbone=noisy", "trainer.steps=40"]
    folder = tmp_path / "run"
    undisturbed = []
    for attempt in range(2):
        train(forks, 2, tmp_path, env, *settings)
        undisturbed.append(last_checkpoint(tmp_path))
        if attempt == 0:  # as if it had been killed after meta-step 20
            (folder / "checkpoints" / "step-00000020.safetensors").replace(
                folder / "checkpoints/last.safetensors"
            )
            (folder / "checkpoints" / "step-00000040.safetensors").unlink()
            (folder / "status.json").unlink()
    assert status(tmp_path)["attempts"] == 1, "it has not run again"
    for name, value in undisturbed[0]["meta"].items():
        assert torch.equal(undisturbed[1]["meta"][name], value), name


def test_all_ranks_skip_what_is_no_number_for_one(
    tmp_path: Path, env: dict[str, str], forks: Forks
) -> None:
    settings = ["+plugins=[holed]", "data=holed", "trainer.nonfinite=skip", "trainer.steps=80"]
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        (folder / "holed.py").write_text(HOLES)
        train(forks, ranks, folder, env, *settings)
    assert_close(tmp_path / "2", tmp_path / "1", 1e-12)
    skipped = last_checkpoint(tmp_path / "2")["skipped"]
    assert skipped == len([task for task in range(80 * 5) if task % 37 == 4]) == 11


def test_a_rank_that_hangs_ends_the_run(tmp_path: Path, env: dict[str, str], forks: Forks) -> None:
    patience = env | {"METARUN_RANK_TIMEOUT": "5"}
    endless = [*TRAIN, "trainer.steps=1000000", "engine.compile=none"]
    first, second = ranks_of(forks, 2, tmp_path, patience, *endless)
    wait_until(first, reached(tmp_path, 10))
    second.send_signal(signal.SIGSTOP)
    _, errors = finish(first, 1)
    assert errors.count("metarun: ") == 1, errors
    assert "no answer for 5 s (METARUN_RANK_TIMEOUT)" in errors
    assert status(tmp_path)["status"] == "failed"
    second.kill()
    second.communicate()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("build", "rank 1: no such network"),
        ("compute", "unexpected RuntimeError: a broken GPU"),
        ("other numbers", "the parameters of rank 1 are no longer those of rank 0"),
    ],
)
def test_what_ends_one_rank_ends_both_with_one_message(
    tmp_path: Path, env: dict[str, str], forks: Forks, fault: str, message: str
) -> None:
    (tmp_path / "odd.py").write_text(FAULTS)
    ranks = ranks_of(
        forks, 2, tmp_path, env | {"FAULT": fault}, *TRAIN, "+plugins=[odd]", "backbone=odd",
        "engine.batching=loop", "engine.compile=none",
    )  # fmt: skip
    errors = "".join(finish(rank, 2 if fault == "build" else 1)[1] for rank in ranks)
    assert errors.count("metarun: ") == 1 and message in errors, errors
    if fault == "build":
        assert not (tmp_path / "run" / "status.json").exists(), "the run has not begun"
    else:
        assert message in str(status(tmp_path)["error"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("trainer.stepz=3", "did you mean trainer.steps?"),
        ("trainer.meta_batch=1", "trainer.meta_batch=1: 2 processes need"),
        ("-m", "torchrun starts one run"),
    ],
)
def test_a_wrong_command_is_told_once(
    tmp_path: Path, env: dict[str, str], forks: Forks, wrong: str, message: str
) -> None:
    (told, _), (silent, _) = (
        reversed(finish(rank, 2)) for rank in ranks_of(forks, 2, tmp_path, env, *TRAIN, wrong)
    )
    assert told.startswith("metarun: ") and message in told and len(told.splitlines()) == 1
    assert silent == ""
    assert list(tmp_path.iterdir()) == [], "a directory was left behind"


def test_eval_finds_the_figures_of_one_process(
    tmp_path: Path, env: dict[str, str], single: Path, forks: Forks
) -> None:
    ranks = ranks_of(forks, 2, tmp_path, env, "eval", f"ckpt={single}/run", "hydra.run.dir=eval")
    outputs = [finish(rank)[0] for rank in ranks]
    assert [output.count("test mse") for output in outputs] == [1, 0]
    found = json.loads((tmp_path / "eval" / "result.json").read_text())["test"]
    assert found == result(single)["test"]
    assert [p.name for p in tmp_path.iterdir()] == ["eval"]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", "cuda"])
def test_two_ranks_on_gpus_find_what_one_does(
    tmp_path: Path, env: dict[str, str], device: str, forks: Forks
) -> None:
    """Sharing a GPU, where sums go by way of the CPU, and on two of them, by NCCL."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        process: Process
        given = [*TRAIN, f"device={device}"]
        process = start(folder, env, given[-1]) if ranks == 2 else forks.start(given, folder, env)
        _, errors = finish(process)
        assert ("share a GPU" in errors) == (device == "cuda:0" and ranks == 2)
    assert_close(tmp_path / "2", tmp_path / "1", 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_consecutive_and_nearly_equal(count: int) -> None:
    for tasks in range(count, 20):
        shares = [Ranks(rank, count).share(tasks) for rank in range(count)]
        assert [n for first, own in shares for n in range(first, first + own)] == list(range(tasks))
        sizes = {own for _, own in shares}
        assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
