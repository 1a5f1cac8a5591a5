"""Functions of the library take a path as text, as they take a `Path`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metarun.cli.report import write_report
from metarun.components.data import omniglot
from metarun.errors import DataError
from metarun.reporting.content import report_on
from metarun.reporting.gather import gather, read_run
from metarun.rundir import checkpoint
from metarun.rundir.directory import finished_result, read_json, read_status
from metarun.rundir.metrics import read_metrics
from tests.conftest import Metarun


def test_omniglot_looks_in_a_folder_given_as_text(tmp_path: Path) -> None:
    for look in (omniglot.load, omniglot.characters):
        read: Callable[..., Any] = look
        with pytest.raises(DataError, match=str(tmp_path)):
            read(str(tmp_path), download=False)


def test_omniglot_is_read_from_a_folder_given_as_text(
    real_data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(cache))
    stores = omniglot.load(root=str(real_data), download=False, rotations=False)
    assert sum(len(store.class_names) for store in stores.values()) == 1623


def test_runs_are_read_from_a_folder_given_as_text(metarun: Metarun, tmp_path: Path) -> None:
    short = ("trainer.eval_episodes=2", "trainer.test_episodes=2", "backbone=mlp")
    metarun("train", "data=sinusoid", "trainer.steps=2", *short, "hydra.run.dir=run")
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    newest = checkpoint.load_newest(str(checkpoints))
    assert newest is not None and newest["step"] == 2
    step = newest["step"]
    assert checkpoint.load_best(str(checkpoints), step)["step"] == step
    assert checkpoint.load(str(checkpoints / "last.safetensors"))["step"] == step
    assert checkpoint.find(str(run)) == checkpoint.find(run)
    assert read_metrics(str(run / "metrics.jsonl")) == read_metrics(run / "metrics.jsonl") != []
    assert read_json(str(run / "status.json")) == read_status(str(run)) != {}
    assert read_run(str(run)) == read_run(run)
    assert gather([str(tmp_path)]) == gather([tmp_path])
    assert finished_result(str(run), newest["config"]) is not None
    assert report_on([str(run)])[1] == report_on([run])[1]
    write_report([str(run)], str(tmp_path / "report"))
    assert (tmp_path / "report" / "report.md").exists()
