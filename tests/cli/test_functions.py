"""`metarun.train` and `metarun.evaluate`: what the commands do, from Python."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metarun
from metarun.errors import ConfigError

TINY = (
    "data=glyphs", "backbone=mlp", "backbone.hidden=[8]", "trainer.steps=2", "task.way=3",
    "trainer.meta_batch=2", "trainer.eval_episodes=2", "trainer.test_episodes=6", "device=cpu",
)  # fmt: skip


def test_a_run_from_python_is_that_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = metarun.train("algo=protonet", *TINY, "hydra.run.dir=mine")
    assert result["run"] == "mine" and result["steps"] == 2
    stored = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert result["test"] == stored["test"]
    again = metarun.train("algo=protonet", *TINY, "hydra.run.dir=mine")
    assert again == result
    figures = metarun.evaluate(result["run"], "episodes=6")
    assert figures["accuracy"] == result["test"]["accuracy"] and figures["episodes"] == 6
    assert Path(figures["run"]).parent == Path("outputs/eval")
    shown = capsys.readouterr()
    assert "test accuracy" in shown.out
    for wrong, words in (
        ("trainer.stepz=3", "did you mean trainer.steps"),
        ("--cfg", "is for the command line"),
        ("trainer.steps=0", "trainer.steps=0: must be from 1"),
        ("=3", "'=3' names no setting"),
        ("", "'' names no setting"),
        ("hydra.run.dir=", "hydra.run.dir= is empty: name a folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            metarun.train(*TINY, wrong)


def test_random_numbers_of_the_caller_are_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs seed torch: three seeds of the caller would draw the same numbers after each call."""
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: metarun.train("algo=protonet", *TINY, "hydra.run.dir=mine"),
        lambda: metarun.evaluate("mine", "episodes=6"),
        lambda: metarun.load("mine"),
        lambda: metarun.FewShotClassifier("mine").fit(
            [np.full((28, 28), shade, dtype=np.uint8) for shade in (0, 99, 255)], ["a", "b", "c"]
        ),
    ):
        drawn = []
        for called in (False, True):
            torch.manual_seed(5)
            if called:
                call()
            drawn.append(torch.rand(1).item())
        assert drawn[0] == drawn[1]


def test_importing_metarun_imports_nothing_else() -> None:
    code = (
        "import sys, metarun; assert 'load' in dir(metarun);"
        "print([m for m in ('torch', 'hydra', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        metarun.trian  # noqa: B018


def test_a_list_of_settings_needs_a_star() -> None:
    wrong: Any = ["seed=0"]
    with pytest.raises(ConfigError, match="a list of them needs a star before it"):
        metarun.train(wrong)
    with pytest.raises(ConfigError, match="a list of them needs a star before it"):
        metarun.evaluate("run", wrong)
