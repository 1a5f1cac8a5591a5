"""W5: drawing the tasks of one meta-batch, without any training."""

import contextlib
import importlib
import io
import itertools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.workloads import omniglot_folder
from metarun.components.build import build_data
from metarun.config.run import TrainConfig

PARTS = ("images_background", "images_evaluation")


def metarun(config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """A meta-batch from metarun's source, as the trainer draws it."""
    source, size = build_data(config, device), config.trainer.meta_batch
    starts = itertools.count(0, size)

    def step() -> None:
        source.sample("train", next(starts), size)

    return step


def learn2learn(config: TrainConfig, device: torch.device) -> Callable[[], None]:
    """As many tasks from learn2learn's Omniglot tasksets, as its examples draw them.

    Its list of which image is of which class, which it keeps on disk, is made before.

    Raises:
        RuntimeError: the files of Omniglot are not there.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        library = importlib.import_module("learn2learn")
    folder = tempfile.TemporaryDirectory(prefix="bench-omniglot-")
    task, size = config.task, config.trainer.meta_batch
    _extract(Path(folder.name))
    # The images are what counts: archives that were packed anew have another checksum.
    importlib.import_module("torchvision.datasets").Omniglot._check_integrity = lambda self: True
    examples = task.shot + task.query
    tasksets = library.vision.benchmarks.get_tasksets(
        "omniglot",
        train_ways=task.way,
        train_samples=examples,
        test_ways=task.way,
        test_samples=examples,
        num_tasks=20000,
        root=folder.name,
    )

    def step(kept: object = folder) -> None:  # the folder goes with the process
        for _ in range(size):
            images, labels = tasksets.train.sample()
            images.to(device), labels.to(device)

    return step


def _extract(root: Path) -> None:
    """Omniglot below `root` as torchvision has it once it is downloaded."""
    found = omniglot_folder()
    if found is None:
        raise RuntimeError("METARUN_DATA names no folder with omniglot-py")
    target = root / found.name
    target.mkdir()
    for part in PARTS:
        if (found / part).is_dir():
            (target / part).symlink_to((found / part).resolve())
        else:
            with zipfile.ZipFile(found / f"{part}.zip") as archive:
                archive.extractall(target)
