"""A short fault campaign; and that the campaign sees what goes wrong."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from torch.utils.tensorboard import SummaryWriter

from metarun.rundir import checkpoint
from tests.conftest import REPO
from tests.forking import Forks

STEPS = 60


@pytest.fixture(autouse=True, scope="module")
def scripts_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        yield


def test_a_short_campaign(
    forks: Forks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its dozen processes are forked; `reference` starts one as the script does."""
    import chaos
    import chaos_faults

    monkeypatch.setattr(chaos_faults, "Popen", forks.popen)
    monkeypatch.setattr(sys, "argv", [
        "chaos.py", "--kills", "1", "--signals", "1", "--full-disk", "1", "--read-only", "0",
        "--clock", "0", "--checkpoints", "1", "--logs", "1", "--files", "0", "--locks", "0",
        "--steps", str(STEPS), "--workers", "1", "--out", str(tmp_path),
    ])  # fmt: skip
    assert chaos.main() == 0, capsys.readouterr()
    kinds = json.loads((tmp_path / "results.json").read_text())["kinds"]
    assert [kinds[kind]["failures"] for kind in kinds] == [0] * 5
    assert [kinds[kind]["faults"] for kind in ("kills", "signals", "checkpoints", "logs")] == [
        1, 1, 1, 1,
    ]  # fmt: skip
    if os.geteuid() != 0:
        assert "needs root" in kinds["full-disk"]["skipped"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the campaign, of 10 meta-steps."""
    from chaos_faults import Case, Plan

    case = Case("reference", Random(0), Plan(tmp_path_factory.mktemp("campaign"), 10))
    case.finish()
    folder: Path = case.folder
    return folder


def change_a_bit(run: Path) -> None:
    content = checkpoint.load(run / "checkpoints" / "best.safetensors")
    next(iter(content["meta"].values())).view(-1)[0] += 1e-6
    (run / "checkpoints" / "best.safetensors").write_bytes(checkpoint.to_bytes(content))


def log_a_step_twice(run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")


def lose_a_step(run: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[1:]))


def show_a_step_twice(run: Path) -> None:
    before = {*(run / "tb").iterdir()}
    writer = SummaryWriter(str(run / "tb"))
    writer.add_scalar("train/loss", 1.0, 10)
    writer.close()
    (new,) = {*(run / "tb").iterdir()} - before
    # TensorBoard reads files in the order of their names, which begin with the second.
    new.rename(run / "tb" / "events.out.tfevents.9999999999")


def change_the_result(run: Path) -> None:
    path = run / "result.json"
    path.write_text(path.read_text().replace('"episodes": 50', '"episodes": 60'))


def leave_a_file(run: Path) -> None:
    (run / "checkpoints" / ".last.safetensors.1.tmp").write_bytes(b"")


def do_not_finish(run: Path) -> None:
    path = run / "status.json"
    path.write_text(path.read_text().replace("completed", "running"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_a_bit, "best.safetensors: meta differs"),
        (log_a_step_twice, "metrics.jsonl: steps"),
        (lose_a_step, "metrics.jsonl: steps"),
        (show_a_step_twice, "TensorBoard: train/loss has other steps (twice: [10])"),
        (change_the_result, "result.json: test"),
        (leave_a_file, "left behind: checkpoints/.last.safetensors.1.tmp"),
        (do_not_finish, "the status is running"),
    ],
)
def test_the_campaign_sees_what_differs(
    reference: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    from chaos_check import differences

    run = tmp_path / "run"
    shutil.copytree(reference, run)
    assert differences(run, reference) == []
    damage(run)
    found = differences(run, reference)
    assert len(found) == 1 and words in found[0]
