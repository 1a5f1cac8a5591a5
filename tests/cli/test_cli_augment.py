"""Augmentation from the command line: trained with, resumed, evaluated without, and drawn."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metarun.rundir import checkpoint
from tests.cli.test_domains import SHAPE, TINY
from tests.conftest import Metarun
from tests.pictures.drawing import draw_classes

AUGMENT = ("augment.crop=4", "augment.flip=0.5", "augment.rotation=15", "augment.brightness=0.4")


def figures(run: Path) -> list[float]:
    found: list[float] = json.loads((run / "result.json").read_text())["test"]["accuracy_per_task"]
    return found


def learned(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(run / "checkpoints/last.safetensors")["meta"]
    return found


def test_a_run_with_augmentation_resumes_and_is_evaluated_without(
    metarun: Metarun, tmp_path: Path
) -> None:
    small = ("train", "data=glyphs", *SHAPE, *TINY, *AUGMENT, "trainer.steps=4",
             "engine.compile=none")  # fmt: skip
    metarun(*small, "hydra.run.dir=whole")
    metarun(*small, "trainer.steps=2", "hydra.run.dir=longer")
    metarun(*small, "hydra.run.dir=longer")
    whole, longer = learned(tmp_path / "whole"), learned(tmp_path / "longer")
    assert all(torch.equal(longer[name], value) for name, value in whole.items())
    metarun("eval", "ckpt=whole", "hydra.run.dir=again")
    assert figures(tmp_path / "again") == figures(tmp_path / "whole")
    assert "crop: 4" in (tmp_path / "whole" / "config.yaml").read_text()
    done = metarun(*small, "augment.crop=3", "hydra.run.dir=whole", code=2)
    assert "augment.crop: 4 there, 3 here" in done.stderr


def test_check_draws_an_augmented_task(metarun: Metarun, tmp_path: Path) -> None:
    draw_classes(tmp_path / "mine", [f"class{number}" for number in range(12)], count=4)
    settings = ("data.root=mine", "data.size=30", "task.way=2", "task.query=2", "task.train.way=3")
    cache = {"METARUN_CACHE": str(tmp_path / "cache")}
    done = metarun("data", "check", "folder", *settings, "augment.saturation=1", "sheet=s.png",
                   **cache)  # fmt: skip
    assert "the first training task, augmented, is drawn in s-augmented.png" in done.stdout
    sheets = [np.asarray(Image.open(tmp_path / name)) for name in ("s.png", "s-augmented.png")]
    assert len(sheets[1]) > len(sheets[0]), "another number of classes"
    done = metarun("data", "check", "folder", *settings, "augment.crop=30", code=2, **cache)
    assert "augment.crop=30: the pictures have 30×30 pixels" in done.stderr
