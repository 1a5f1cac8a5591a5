"""Trained runs without the training, and tasks as files of pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metarun.episodes.source import Episodes
from metarun.rundir import checkpoint
from metarun.rundir.checkpoint_files import best_file
from metarun.training.setup import Setup
from metarun.training.state import fresh, snapshot
from tests.setups import setup_of, stirred

TASK = ("data=glyphs", "task.way=3", "task.shot=2", "task.query=2", "engine.precision=float64")
GLYPHS = (*TASK, "backbone=conv4", "backbone.width=3")


def write_run(folder: Path, *settings: str) -> Setup:
    """A run whose weights nobody has learned."""
    setup = setup_of(*settings)
    state = fresh(setup)
    with torch.no_grad():
        for name, value in stirred(setup).items():
            if name not in setup.algorithm.kept:
                state.meta[name].copy_(value)
    path = best_file(folder / "checkpoints")
    path.parent.mkdir(parents=True)
    path.write_bytes(checkpoint.to_bytes(snapshot(setup, state)))
    return setup


def weights_of(folder: Path) -> dict[str, Tensor]:
    meta: dict[str, Tensor] = checkpoint.load(checkpoint.find(folder))["meta"]
    return meta


def save(path: Path, ink: Tensor) -> None:
    """A picture of dark ink on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (255 - (ink * 255).round()).to(torch.uint8)
    Image.fromarray(pixels[0].numpy()).save(path)


def write_task(folder: Path, task: Episodes) -> None:
    """`support/<class>/<number>.png` and `query/<class>-<number>.png`."""
    for number, (x, y) in enumerate(zip(task.support_x, task.support_y, strict=True)):
        save(folder / "support" / f"class{y}" / f"{number}.png", x)
    for number, (x, y) in enumerate(zip(task.query_x, task.query_y, strict=True)):
        save(folder / "query" / f"class{y}-{number}.png", x)


def draw(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    """A picture of coloured noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
