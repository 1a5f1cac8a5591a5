"""Which checkpoints stay: never is the only good one deleted."""

import os
from pathlib import Path

import pytest
import torch

from metarun.rundir import checkpoint
from metarun.system import archive
from metarun.system.untrusted import DamagedError
from tests.conftest import Metarun
from tests.rundir.test_checkpoint import content, save

TINY = (
    "train", "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]", "trainer.meta_batch=2",
    "trainer.eval_episodes=3", "trainer.test_episodes=3", "trainer.eval_every=2",
    "trainer.checkpoint_every=2", "hydra.run.dir=run",
)  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_stay_and_those_of_every_nth_step(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, keep_last=2, keep_every=30)
    steps = [30, 60, 70]
    assert names(tmp_path) == [
        "last.safetensors",
        *(f"step-{step:08d}.safetensors" for step in steps),
    ]
    save(tmp_path, 80, keep_last=1)
    assert names(tmp_path) == ["last.safetensors", "step-00000080.safetensors"]


def test_files_of_a_lost_attempt_do_not_push_out_newer_ones(tmp_path: Path) -> None:
    save(tmp_path, 90)
    for step in (10, 20):
        save(tmp_path, step, keep_last=1)
    assert names(tmp_path) == [
        "last.safetensors",
        "step-00000020.safetensors",
        "step-00000090.safetensors",
    ]


def test_the_best_few_stay_under_names_that_say_the_step(tmp_path: Path) -> None:
    tops = ([100], [100, 200], [300, 100], [300, 100, 400][:2], [500, 300])
    for step, top in zip((100, 200, 300, 400, 500), tops, strict=True):
        if step in top:
            checkpoint.save_best(tmp_path, content(step), top, keep=2)
            kept = [f"best-step-{s:08d}.safetensors" for s in sorted(top)]
            assert names(tmp_path) == [*kept, "best.safetensors"]
            assert checkpoint.load(tmp_path / "best.safetensors")["step"] == top[0]
    checkpoint.save_best(tmp_path, content(600), [600], keep=1)
    assert names(tmp_path) == ["best.safetensors"]


def test_nothing_is_replaced_or_deleted_before_the_new_file_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says that it has written, and has not."""
    save(tmp_path, 10, keep_last=1)
    checkpoint.save_best(tmp_path, content(10), [10], keep=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.fsync

    def forgetful(descriptor: int) -> None:
        real(descriptor)
        if os.fstat(descriptor).st_size > 1000:  # not a folder
            os.truncate(f"/proc/self/fd/{descriptor}", 1000)

    monkeypatch.setattr(os, "fsync", forgetful)
    with pytest.raises(OSError, match="does not give back what was written"):
        save(tmp_path, 20, keep_last=1)
    with pytest.raises(OSError, match="does not give back what was written"):
        checkpoint.save_best(tmp_path, content(20), [20], keep=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_verify_notices_one_wrong_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    archive.verify(path)
    data = bytearray(path.read_bytes())
    data[data.find(torch.full((50,), 3.0).numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="bad checksum"):
        archive.verify(path)


def test_a_run_keeps_what_it_is_told_and_may_be_told_otherwise_when_resumed(
    tmp_path: Path, metarun: Metarun
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    policy = ("trainer.keep_best=3", "trainer.keep_every=4", "trainer.keep_last=1")
    metarun(*TINY, "trainer.steps=10", *policy)
    content = checkpoint.load(folder / "last.safetensors")
    top = content["top"]
    assert len(top) == 3 and top[0] == content["best"]
    assert [v["score"] for v in top] == sorted(v["score"] for v in top)  # an error: lower is better
    best = [f"best-step-{step:08d}.safetensors" for step in sorted(v["step"] for v in top)]
    steps = [f"step-{step:08d}.safetensors" for step in (4, 8, 10)]
    assert names(folder) == sorted([*best, "best.safetensors", "last.safetensors", *steps])
    for name, validation in zip(best, sorted(top, key=lambda v: v["step"]), strict=True):
        assert checkpoint.load(folder / name)["step"] == validation["step"]
    kept = checkpoint.load(folder / "best.safetensors")
    # Another policy is no other config, whether the run is finished or goes on.
    done = metarun(*TINY, "trainer.steps=10", "trainer.keep_last=5")
    assert "finished: nothing to do" in done.stderr
    (tmp_path / "run" / "status.json").write_text("{}")
    (folder / "last.safetensors").write_bytes((folder / "step-00000008.safetensors").read_bytes())
    metarun(*TINY, "trainer.steps=10", "trainer.keep_last=1", "trainer.keep_best=3")
    again = checkpoint.load(folder / "best.safetensors")
    assert (again["step"], again["top"]) == (kept["step"], kept["top"])
    assert [n for n in names(folder) if n.startswith("step")] == ["step-00000010.safetensors"]
    refused = metarun(*TINY, "trainer.steps=11", "trainer.keep_every=3", code=2)
    assert "trainer.keep_every=3: must be a multiple of trainer.checkpoint_every=2" in (
        refused.stderr
    )


def test_more_of_the_best_are_not_kept_than_from_the_start(
    tmp_path: Path, metarun: Metarun
) -> None:
    """What has been dropped may be better than what comes: an ensemble would not be of the best."""
    metarun(*TINY, "trainer.steps=6", "trainer.keep_best=2")
    refused = metarun(*TINY, "trainer.steps=10", "trainer.keep_best=3", code=2).stderr
    assert "trainer.keep_best=3: the run has kept 2 of its best checkpoints so far" in refused
    metarun(*TINY, "trainer.steps=10", "trainer.keep_best=1")
    assert len(checkpoint.load(tmp_path / "run/checkpoints/last.safetensors")["top"]) == 1
    refused = metarun(*TINY, "trainer.steps=12", "trainer.keep_best=2", code=2).stderr
    assert "the run has kept 1 of its best" in refused
