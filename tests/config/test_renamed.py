"""Old spellings keep working, and are told of."""

from pathlib import Path

import pytest

from metarun.config.renamed import with_todays_names, with_todays_options
from tests.conftest import Metarun

TINY = (
    "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]", "trainer.steps=2",
    "trainer.meta_batch=2", "trainer.eval_episodes=2", "trainer.test_episodes=2",
    "inner_opt.parts=[{params: '*', name: sgd, lr: 0.01}]", "hydra.run.dir=run",
)  # fmt: skip


def test_names_on_a_command_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    given = ["inner_opt=sgd,mixed", "inner_opt.lr=1", "algo=mixed", "-m", "inner_opt=mixed"]
    now = ["inner_opt=sgd,partition", "inner_opt.lr=1", "algo=mixed", "-m", "inner_opt=partition"]
    assert with_todays_names(given) == now
    assert "inner_opt=mixed is called inner_opt=partition now" in caplog.text
    caplog.clear()
    assert with_todays_names(now) == now and not caplog.text


def test_names_in_a_stored_config() -> None:
    stored = {"inner_opt": {"name": "mixed", "parts": []}, "algo": {"name": "mixed"}}
    assert with_todays_options(stored)["inner_opt"] == {"name": "partition", "parts": []}
    assert with_todays_options(stored)["algo"] == {"name": "mixed"}
    for strange in ({}, {"inner_opt": None}, {"inner_opt": {"name": ["mixed"]}}):
        assert with_todays_options(strange) == strange


def test_a_run_of_before_is_recalled(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun("train", *TINY, "inner_opt=mixed")
    assert "inner_opt=mixed is called inner_opt=partition now" in done.stderr
    config = tmp_path / "run" / "config.yaml"
    assert "name: partition" in config.read_text()
    config.write_text(config.read_text().replace("name: partition", "name: mixed"))
    again = metarun("train", *TINY, "inner_opt=partition")
    assert "step 2/2" not in again.stderr, "recalled, not trained"
