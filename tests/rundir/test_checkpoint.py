"""Checkpoints: intact or refused, never half written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from metarun.errors import CheckpointError, ConfigError
from metarun.rundir import checkpoint
from metarun.system import archive
from metarun.system.files import write_atomically
from tests.conftest import REPO


def content(step: int) -> dict:
    return {
        "config": {"seed": 1},
        "step": step,
        "skipped": 0,
        "meta": {"w": torch.full((50,), float(step))},
        "outer_optimizer": {"state": {}, "param_groups": []},
        "scheduler": None,
        "best": {"step": 0, "score": 0.5, "ci95": float("nan")},
        "top": [],
        "last_eval": 0,
        "recent": {},
        "planned_for": 20,
        "buffers": {},
        "frozen": {},
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
    }


def save(folder: Path, step: int, keep_last: int = 2, keep_every: int | None = None) -> Path:
    return checkpoint.save(folder, content(step), keep_last, keep_every)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    back = checkpoint.load(path)
    assert back["step"] == 7 and torch.equal(back["meta"]["w"], content(7)["meta"]["w"])
    assert back["format"] == "metarun-checkpoint" and back["version"] == checkpoint.VERSION


def test_any_tool_opens_the_weights_by_the_names_of_their_modules(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    own = {"frozen": {"0.bias": model[0].bias}, "buffers": dict(model.named_buffers())}
    path = checkpoint.save(tmp_path, content(7) | {"meta": learned} | own, 3, None)
    found = safetensors.torch.load_file(path)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other.load_state_dict({name: found[name] for name in other.state_dict()})
    x = torch.randn(5, 3)
    assert torch.equal(other(x), model(x))
    assert {name for name in found if name not in other.state_dict()} == {"rng/cpu"}


def test_buffers_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    own = {"mask": torch.tensor([True, False]), "turn": torch.tensor([1j, 2.0])}
    for part in ("buffers", "frozen"):
        back = checkpoint.load(checkpoint.save(tmp_path, content(7) | {part: own}, 3, None))
        assert all(torch.equal(back[part][name], value) for name, value in own.items())


def test_the_state_of_an_optimizer_comes_back_as_torch_made_it(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.Adam(weights, lr=0.1, betas=(0.8, 0.9))
    weights[0].grad = torch.ones(3)  # the other has no state
    optimizer.step()
    state = optimizer.state_dict()
    path = checkpoint.save(tmp_path, content(7) | {"outer_optimizer": state}, 3, None)
    back = checkpoint.load(path)["outer_optimizer"]
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == state["state"].keys() == {0}
    assert all(torch.equal(back["state"][0][k], v) for k, v in state["state"][0].items())


@pytest.mark.parametrize("parts", [{}, {"buffers": {"mask": torch.ones(2)}, "frozen": {}}])
def test_checkpoints_of_before_are_named_and_converted(tmp_path: Path, parts: dict) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    before = {k: v for k, v in content(3).items() if k not in ("skipped", "top", *parts)}
    before |= {"format": checkpoint.FORMAT, "version": 2 if parts else 1, **parts}
    before["config"] = {"trainer": {"steps": 9}}
    before["recent"] = torch.empty(0, 0)
    del before["planned_for"]
    if not parts:
        before["recent"] = [torch.arange(5.0)] * 2  # as the first version had it
        del before["buffers"], before["frozen"]
    torch.save(before, folder / "last.pt")
    words = "of an older metarun: convert them with scripts/convert_checkpoint.py"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_newest(folder)
    with pytest.raises(ConfigError, match=words):
        checkpoint.find(tmp_path / "run")
    with pytest.raises(CheckpointError, match="older metarun, convert them"):
        checkpoint.load(folder / "last.pt")
    script = REPO / "scripts" / "convert_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(folder / "last.pt")], check=True)
    back = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert torch.equal(back["meta"]["w"], before["meta"]["w"]) and back["planned_for"] == 9
    assert back["buffers"].keys() == parts.get("buffers", {}).keys()
    assert [top["score"] for top in back["top"]] == [0.5] and back["skipped"] == 0
    if not parts:
        assert torch.equal(back["recent"]["gradient_norm"], torch.full((2,), 2.0))
        assert torch.equal(back["recent"]["inner_losses"], torch.tensor([[3.0, 4.0]] * 2))


def test_last_is_the_newest_and_old_ones_go(tmp_path: Path) -> None:
    for step in (900, 1000, 99_999_999, 100_000_000):
        save(tmp_path, step)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["last.safetensors", "step-100000000.safetensors", "step-99999999.safetensors"]
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None and newest["step"] == 100_000_000


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_serves(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    for path in (tmp_path / "last.safetensors", tmp_path / "step-00000002.safetensors"):
        data = bytearray(path.read_bytes())
        middle = data.find(torch.full((50,), 2.0).numpy().tobytes()) + 100
        data[middle] ^= 0x10 if damage == "flip" else 0
        wrong = {
            "truncate": bytes(data[: len(data) // 2]),
            "flip": bytes(data),
            "empty": b"",
            "text": b"not a checkpoint",
        }
        path.write_bytes(wrong[damage])
    with pytest.raises(CheckpointError, match="damaged, truncated or not a checkpoint"):
        checkpoint.load(tmp_path / "last.safetensors")
    back = checkpoint.load_newest(tmp_path)
    assert back is not None and back["step"] == 1
    assert "trying the one before" in caplog.text
    (tmp_path / "step-00000001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("name", ["best.safetensors", "best-step-00000004.safetensors"])
def test_the_best_checkpoint_serves_where_it_is_the_newest_intact(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path, 2)
    save(tmp_path, 5)
    checkpoint.save_best(tmp_path, content(4), top=[4], keep=1)
    (tmp_path / "best.safetensors").rename(tmp_path / name)

    def newest() -> int:
        back = checkpoint.load_newest(tmp_path)
        assert back is not None
        return back["step"]

    steps = []
    for damaged in ("last.safetensors", "step-00000005.safetensors", "step-00000002.safetensors"):
        steps.append(newest())
        (tmp_path / damaged).write_bytes(b"")
    assert [*steps, newest()] == [5, 5, 4, 4]
    save(tmp_path, 2)
    (tmp_path / "last.safetensors").unlink()
    (tmp_path / name).write_bytes(b"")
    assert newest() == 2
    (tmp_path / "step-00000002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        newest()


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    data = path.read_bytes()
    for offset in range(0, len(data), 7):
        broken = bytearray(data)
        broken[offset] ^= 1
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/metarun-was-hacked",)


@pytest.mark.parametrize("foreign", [{"weights": torch.ones(2)}, [1, 2], torch.ones(3), Evil()])
def test_a_foreign_file_is_refused_and_runs_no_code(tmp_path: Path, foreign: object) -> None:
    path = tmp_path / "model.pt"
    torch.save(foreign, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(path)
    assert not Path("/tmp/metarun-was-hacked").exists()


def test_a_newer_format_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "future.safetensors"
    path.write_bytes(archive.to_bytes({"format": checkpoint.FORMAT, "version": 99, "meta": {}}))
    with pytest.raises(CheckpointError, match=r"format 99.*newer metarun"):
        checkpoint.load(path)


def test_no_checkpoint_is_not_an_error_when_resuming(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "nothing") is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "nothing.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half(file) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("copy", ["step-00000002.safetensors", "best-step-00000002.safetensors"])
def test_a_copy_takes_the_place_of_a_damaged_best_checkpoint(tmp_path: Path, copy: str) -> None:
    checkpoint.save_best(tmp_path, content(2), top=[2], keep=1)
    good = (tmp_path / "best.safetensors").read_bytes()
    assert checkpoint.load_best(tmp_path, 2)["step"] == 2
    (tmp_path / "best.safetensors").write_bytes(good[:-200])
    with pytest.raises(CheckpointError, match="no other checkpoint of meta-step 2, the best"):
        checkpoint.load_best(tmp_path, 2)
    (tmp_path / copy).write_bytes(good)
    back = checkpoint.load_best(tmp_path, 2)
    assert torch.equal(back["meta"]["w"], content(2)["meta"]["w"])
    assert (tmp_path / "best.safetensors").read_bytes() == good


@pytest.mark.parametrize("older", [1, 3])
def test_the_best_checkpoint_is_of_the_best_validation_or_none(tmp_path: Path, older: int) -> None:
    """A best.safetensors of another validation is sound, and would be tested without a word."""
    checkpoint.save_best(tmp_path, content(older), top=[older], keep=1)
    with pytest.raises(CheckpointError, match="no other checkpoint of meta-step 2, the best"):
        checkpoint.load_best(tmp_path, 2)
    save(tmp_path, 2)
    for _ in range(2):  # the second time from best.safetensors, which is the right one now
        back = checkpoint.load_best(tmp_path, 2)
        assert back["step"] == 2 and torch.equal(back["meta"]["w"], content(2)["meta"]["w"])
        (tmp_path / "step-00000002.safetensors").unlink(missing_ok=True)


def test_the_best_checkpoint_of_another_run_is_lost(tmp_path: Path) -> None:
    checkpoint.save_best(tmp_path, content(2) | {"config": {"seed": 7}}, top=[2], keep=1)

    def is_of_run(found: dict) -> bool:
        return bool(found["config"] == {"seed": 1})

    with pytest.raises(CheckpointError, match="no other checkpoint of meta-step 2, the best"):
        checkpoint.load_best(tmp_path, 2, is_of_run)
    save(tmp_path, 2)
    assert checkpoint.load_best(tmp_path, 2, is_of_run)["config"] == {"seed": 1}
    assert checkpoint.load(tmp_path / "best.safetensors")["config"] == {"seed": 1}


@pytest.mark.parametrize(
    "old", [None, "text", {"format": "metarun-checkpoint"}, {"format": "x"}, [1, 2]]
)
def test_a_conversion_leaves_what_is_there(tmp_path: Path, old: object) -> None:
    path, script = tmp_path / "best.pt", REPO / "scripts" / "convert_checkpoint.py"
    if old is not None:
        torch.save(old, path) if old != "text" else path.write_text("text")

    def convert() -> str:
        command = [sys.executable, str(script), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "is no checkpoint of metarun" in convert()
    assert not (tmp_path / "best.safetensors").exists()
    (tmp_path / "best.safetensors").write_bytes(b"precious")
    assert "is there already" in convert()
    assert (tmp_path / "best.safetensors").read_bytes() == b"precious"
