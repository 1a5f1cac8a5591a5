"""Time the conversion of pictures and the drawing of episodes, against torchvision and learn2learn.

    python scripts/bench_data.py                                # all: half an hour on two cores
    python scripts/bench_data.py --small 2000 --large 500       # does it work?

Pictures: JPEG files that are drawn first, in a temporary folder that goes with the program (10 GB
at most). metarun converts them to its file of 84×84 pixels, verification included; torchvision's
ImageFolder with Resize and CenterCrop is read once through a DataLoader with as many workers.
Episodes: 5-way 1-shot with 15 queries of 84×84 pixels. learn2learn's TaskDataset draws them from
float images in memory, as its MiniImagenet has them, and from the JPEG files.

Both sides take turns; printed are medians over the rounds, and the spread.
"""

import argparse
import contextlib
import importlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize, ToTensor
from tqdm import tqdm

from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore
from metarun.pictures.convert import converted
from metarun.pictures.decode import Preprocessing
from metarun.pictures.layouts import list_pictures
from metarun.system.memory import keep_memory

SIDE = 84
CLASSES = 100
WAY, SHOT, QUERY = 5, 1, 15
MOST = 100  # images of a class that are held in memory as floats: 850 MB
TOGETHER = 16  # episodes that metarun draws at a time, as a meta-batch


def draw(root: Path, count: int, size: tuple[int, int]) -> None:
    """Class folders of JPEG files: smoothed noise, which compresses about as photographs do."""
    rng = np.random.default_rng(0)
    for number in tqdm(range(count), f"drawing {size[0]}×{size[1]}", disable=None):
        folder = root / f"class{number % CLASSES:03}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (size[1] // 2, size[0] // 2, 3), np.uint8)
        image = Image.fromarray(noise).resize(size).filter(ImageFilter.GaussianBlur(1))
        image.save(folder / f"{number:06}.jpg", quality=90)


def convert(root: Path, home: Path) -> ClassStore:
    """Convert with metarun, into a new cache; to delete an old one is not what is timed."""
    os.environ["METARUN_CACHE"] = tempfile.mkdtemp(prefix="cache-", dir=home)
    return converted("bench", list_pictures(root), Preprocessing(size=SIDE))


def read_all(root: Path, workers: int) -> int:
    """Read with torchvision, as pixels of the same size; how many there were."""
    change = Compose([Resize(SIDE), CenterCrop(SIDE), PILToTensor()])
    loader = DataLoader(ImageFolder(str(root), change), batch_size=64, num_workers=workers)
    return sum(len(images) for images, _ in loader)


def episodes_of(store: ClassStore) -> Callable[[int], None]:
    """What draws so many episodes with metarun."""
    source = ImageEpisodes(
        {"train": store}, way=WAY, shot=SHOT, query=QUERY, seed=0, device=torch.device("cpu")
    )

    def run(count: int) -> None:
        for start in range(0, count, TOGETHER):
            source.sample("train", start, TOGETHER)

    return run


def tasks_of(data: Any) -> Callable[[int], None]:
    """What draws so many tasks with learn2learn."""
    with contextlib.redirect_stderr(io.StringIO()):
        library = importlib.import_module("learn2learn")
    meta, parts = library.data.MetaDataset(data), library.data.transforms
    tasks = library.data.TaskDataset(
        meta,
        [
            parts.NWays(meta, WAY),
            parts.KShots(meta, SHOT + QUERY),
            parts.LoadData(meta),
            parts.RemapLabels(meta),
            parts.ConsecutiveLabels(meta),
        ],
        num_tasks=20000,
    )

    def run(count: int) -> None:
        for _ in range(count):
            tasks.sample()

    return run


def rates(runs: dict[str, tuple[Callable[[], object], int]], rounds: int) -> None:
    """Time what does so many things, in turns, and print how many it does in a second."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, count) in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(count / (time.perf_counter() - start))
    first = next(iter(found))
    for name, own in found.items():
        ratio = [a / b for a, b in zip(found[first], own, strict=True)]
        than = "" if name == first else f"; {first} is {statistics.median(ratio):.2f} times as fast"
        spread = f"{min(own):,.0f} to {max(own):,.0f}"
        print(f"  {name}: {statistics.median(own):,.0f} per second ({spread}){than}", flush=True)


def main() -> None:
    """Draw, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", type=int, default=60_000, help="JPEG files of 84×84")
    parser.add_argument("--large", type=int, default=20_000, help="JPEG files of 500×375")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    keep_memory()
    print(f"{chosen.workers} workers, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        home = Path(folder)
        for name, count, size in (
            ("small", chosen.small, (SIDE, SIDE)),
            ("large", chosen.large, (500, 375)),
        ):
            draw(home / name, count, size)
            read_all(home / name, chosen.workers)  # from the disk, once, for both
            print(f"{count:,} JPEG of {size[0]}×{size[1]} to {SIDE}×{SIDE}")
            runs: dict[str, tuple[Callable[[], object], int]] = {
                "metarun": (lambda name=name: convert(home / name, home), count),
                "torchvision": (lambda name=name: read_all(home / name, chosen.workers), count),
            }
            rates(runs, chosen.rounds)
        store = convert(home / "small", home)
        print(f"episodes: {WAY}-way {SHOT}-shot, {QUERY} queries, {SIDE}×{SIDE}×3")
        own, few = episodes_of(store), store.sizes.clamp(max=MOST)
        rows = torch.cat([s + torch.arange(n) for s, n in zip(store.starts, few, strict=True)])
        labels = torch.arange(CLASSES).repeat_interleave(few)
        in_memory = tasks_of(TensorDataset(store.take(rows).float(), labels))
        from_files = tasks_of(ImageFolder(str(home / "small"), ToTensor()))
        rates(
            {
                "metarun": (lambda: own(320), 320),
                "learn2learn, from memory": (lambda: in_memory(160), 160),
                "learn2learn, from files": (lambda: from_files(16), 16),
            },
            chosen.rounds,
        )


if __name__ == "__main__":
    main()
