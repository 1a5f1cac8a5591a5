"""`metarun eval` on another domain: data of another kind than the run was trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metarun.cli import help as texts
from metarun.cli.completion import candidates
from metarun.cli.main import COMMANDS
from metarun.config.compose import composed, register_schemas
from metarun.config.typed import with_more
from tests.conftest import Metarun

TINY = (
    "backbone=mlp", "backbone.hidden=[8]", "trainer.steps=2", "trainer.meta_batch=2",
    "trainer.eval_episodes=2", "trainer.test_episodes=6",
)  # fmt: skip
SHAPE = ("task.way=3", "task.query=2")


def draw_folder(root: Path, side: int = 32) -> Path:
    """Pictures in colour of twelve classes, four of each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 4), ("test", 4)):
        for number in range(count):
            folder = root / split / f"{split}{number}"
            folder.mkdir(parents=True)
            for picture in range(4):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{picture}.png")
    return root


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_run_is_evaluated_on_another_domain(metarun: Metarun, tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures")
    metarun("train", "data=glyphs", *SHAPE, *TINY, "hydra.run.dir=run")
    asked = ("eval", "ckpt=run", "data=folder", f"data.root={pictures}")

    def refused(*more: str) -> str:
        return metarun(*asked, *more, "hydra.run.dir=no", code=2).stderr

    words = refused()
    assert "images of 3×84×84 (channels × height × width), the run was trained on" in words
    assert "images of 1×28×28" in words and "(data=glyphs)" in words
    assert "give data.size=28 data.color=grey, or data.fit=true" in words
    assert "give data.color=grey, or data.fit=true" in refused("data.size=28")
    assert "data=folder has no such setting (did you mean data.size?)" in refused("data.sise=28")
    assert "task.shot + task.query" in refused("data.size=28", "data.color=grey", "task.query=4")

    right = ("data.size=28", "data.color=grey")
    done = metarun(*asked, *right, "hydra.run.dir=right")
    assert "data folder: another domain than in training (glyphs)" in done.stdout
    found = result(tmp_path / "right")
    assert found["changed"] == {"data": "folder", "data.size": 28, "data.color": "grey"}
    test = found["test"]
    assert (test["data"], test["training_data"], test["other_data"]) == ("folder", "glyphs", True)
    assert test["episodes"] == 6 and (test["way"], test["query"]) == (3, 2)
    own = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert test["training_data_identity"] == own["data_identity"] != test["data_identity"]

    metarun(*asked, "data.fit=true", "hydra.run.dir=fit")
    metarun(*asked, "data.fit=true", "data.invert=true", "hydra.run.dir=dark")
    losses = {
        name: result(tmp_path / name)["test"]["loss_per_inner_step"]
        for name in ("right", "fit", "dark")
    }
    assert losses["fit"] != losses["dark"]
    assert result(tmp_path / "dark")["changed"] == {
        "data": "folder", "data.fit": True, "data.invert": True,
    }  # fmt: skip

    # The run's own data keep the settings that it was trained with.
    metarun("eval", "ckpt=run", "data=glyphs", "hydra.run.dir=same")
    same = result(tmp_path / "same")
    assert same["changed"] == {} and same["test"]["accuracy"] == own["accuracy"]
    assert "training_data" not in same["test"]
    done = metarun("eval", "ckpt=run", "data.fit=true", "hydra.run.dir=no", code=2)
    assert "data.fit: it is for the data of another domain" in done.stderr
    done = metarun("eval", "ckpt=run", "data=sinusoid", "hydra.run.dir=no", code=2)
    assert "data=sinusoid: its tasks are regression, and the run was trained on" in done.stderr


def test_curves_of_another_kind_are_another_domain(metarun: Metarun, tmp_path: Path) -> None:
    metarun("train", "data=sinusoid", *TINY, "hydra.run.dir=run")
    metarun("eval", "ckpt=run", "data=harmonic", "hydra.run.dir=other")
    assert result(tmp_path / "other")["test"]["training_data"] == "sinusoid"
    done = metarun("eval", "ckpt=run", "data=glyphs", "hydra.run.dir=no", code=2)
    assert "its tasks are classification, and the run was trained on regression" in done.stderr
    done = metarun("eval", "ckpt=run", "data=harmonic", "data.fit=true", code=2)
    assert "data=harmonic has no images that could be changed" in done.stderr


def test_a_classifier_of_all_training_classes_goes_to_another_domain(
    metarun: Metarun, tmp_path: Path
) -> None:
    """Its head has as many rows as there were classes in training, not in the new data."""
    pictures = draw_folder(tmp_path / "pictures")
    metarun("train", "algo=baseline", "data=glyphs", *SHAPE, *TINY, "hydra.run.dir=run")
    asked = ("data=folder", f"data.root={pictures}", "data.fit=true")
    metarun("eval", "ckpt=run", *asked, "hydra.run.dir=other")
    assert result(tmp_path / "other")["test"]["training_data"] == "glyphs"


def test_a_mistyped_name_is_refused_at_once(metarun: Metarun) -> None:
    done = metarun("eval", "ckpt=nowhere", "data=glyhps", "--cfg", "job", code=2)
    assert "data=glyhps: there is no such option (did you mean data=glyphs?)" in done.stderr


def test_help_and_config_of_another_domain_do_not_wait_for_torch(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    given = ("eval", "ckpt=run", "data=folder", "data.layout=csv")
    text = metarun(*given, "--help", PYTHONPATH=str(tmp_path)).stdout
    assert "* data=folder " in text and "data.layout=auto" in text
    text = metarun(*given, "--cfg", "job", PYTHONPATH=str(tmp_path)).stdout
    assert "name: folder" in text and "layout: csv" in text


def test_the_settings_of_another_domain_are_completed() -> None:
    register_schemas()

    def words(line: str) -> set[str]:
        return {candidate.word for candidate in candidates(line, COMMANDS)}

    assert {"data=emoji", "data=glyphs"} <= words("metarun eval data=")
    assert "data.size=" in words("metarun eval data=emoji data.s")
    assert words("metarun eval data.s") == set()
    assert words("metarun eval data=emoji data.split=") >= {"data.split=artist"}
    own = texts.settings(composed("eval", with_more(["data=emoji"])))
    assert len({setting.key for setting in own}) == len(own)


@pytest.mark.parametrize("name", ["data.fit", "data.invert"])
def test_what_is_done_to_images_is_explained(name: str) -> None:
    own = {setting.key: setting.meaning for setting in texts.settings(composed("eval", []))}
    assert "another domain's images" in own[name]
