"""Weights & Biases without its server: what an offline run has written."""

import json
import signal
import struct
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from metarun.errors import ConfigError
from metarun.rundir.metrics import read_metrics
from metarun.training.loggers import wandb as ours
from tests.conftest import Metarun
from tests.forking import Forks

RUN = (
    "train", "data=sinusoid", "backbone=mlp", "inner_opt.lr=0.02", "trainer.steps=1500",
    "trainer.eval_every=500", "trainer.checkpoint_every=100", "trainer.log_every=50",
    "trainer.eval_episodes=4", "trainer.test_episodes=4", "hydra.run.dir=run",
    "trainer.wandb=offline", "trainer.wandb_project=sines",
)  # fmt: skip
TAGS = {"train/loss", "val/loss"}


def records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left  # the rest of a block, too short for a header
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + size > len(data):
            return  # cut short by a kill
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def plain(items: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def test_a_killed_run_goes_on_as_the_same_run_and_logs_what_metrics_jsonl_has(
    metarun: Metarun, environment: dict[str, str], forks: Forks, tmp_path: Path
) -> None:
    process = forks.start(RUN, tmp_path, environment)
    run = tmp_path / "run"
    deadline = time.monotonic() + 200
    while not any(r["step"] >= 300 for r in read_metrics(run / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    metarun(*RUN)
    first, second = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name, "both attempts are one run of W&B"
    found = list(records(second))
    (started,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (started.project, started.display_name) == ("sines", "run")
    assert started.run_id == (run / "wandb" / "id").read_text().strip()
    settings = plain(started.config.update)
    assert settings["inner_opt.lr"] == 0.02 and settings["algo.name"] == "maml"
    logged: dict[tuple[int, str], float] = {}
    for entry in (r.history for r in found if r.WhichOneof("record_type") == "history"):
        values = plain(entry.item)
        if "meta_step" in values:
            assert (values["meta_step"], next(iter(values.keys() & TAGS))) not in logged
            logged |= {(values["meta_step"], tag): v for tag, v in values.items()}
    expected = read_metrics(run / "metrics.jsonl")
    assert len(expected) == 33
    for record in expected:
        for tag, value in record.items():
            if tag not in ("step", "time/elapsed_s"):
                assert logged[record["step"], tag] == value
    test = json.loads((run / "result.json").read_text())["test"]
    summary: dict[str, Any] = {}
    curve = []
    for r in found:
        kind = r.WhichOneof("record_type")
        if kind == "summary":
            summary |= plain(r.summary.update)
        elif kind == "history" and "test/mse_by_inner_step" in (v := plain(r.history.item)):
            curve.append((v["inner_step"], v["test/mse_by_inner_step"]))
        elif kind == "exit":
            assert r.exit.exit_code == 0
    assert summary["test/mse"] == test["mse"] and "val/best_mse" in summary
    assert curve == list(enumerate(test["mse_per_inner_step"]))
    metarun(*(a for a in RUN if "wandb" not in a))  # recalled: another logger is no other run


def test_a_missing_package_and_a_wrong_mode_are_refused(
    metarun: Metarun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ours, "version", missing)
    ours.require_wandb("off")
    with pytest.raises(ConfigError, match=r"trainer.wandb=offline needs .*'metarun\[wandb\]'"):
        ours.require_wandb("offline")
    done = metarun("train", "trainer.wandb=yes", code=2)
    assert "trainer.wandb=yes: choose one of off, online, offline" in done.stderr


def test_online_without_a_login_says_what_to_do(metarun: Metarun, tmp_path: Path) -> None:
    online = [a if "offline" not in a else "trainer.wandb=online" for a in RUN]
    done = metarun(*online, code=1, HOME=str(tmp_path), WANDB_API_KEY="")
    assert "Weights & Biases does not start" in done.stderr and "wandb login" in done.stderr
