"""The data sets of learn2learn's benchmarks, read by learn2learn from its own files.

Its tasksets draw their tasks by global random numbers, one after the other. Here learn2learn reads
the data set, and metarun draws the tasks.

References:
    Arnold et al. 2020, learn2learn: a library for meta-learning research.
"""

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops
from tqdm import tqdm

from metarun.components.data._data_root import home
from metarun.components.data.images import image_episodes
from metarun.config.checks import absolute
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.cache import cached
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_sizes, select_classes, with_rotations
from metarun.errors import ConfigError, DataError, first_line
from metarun.pictures.decode import Pixels, Preprocessing
from metarun.pictures.inputs import Inputs, reads
from metarun.system.files import cache_dir
from metarun.system.plain_pickle import read_pickle
from metarun.system.untrusted import UntrustedError

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # by learn2learn's names
OMNIGLOT_SPLIT = (1100, 1200)  # where its shuffled classes are cut


class Files(NamedTuple):
    """What a benchmark reads.

    Attributes:
        reader: learn2learn's class.
        there: its files and folders below the root.
        side: pixels of each side.
    """

    reader: str
    there: Sequence[str]
    side: int


BENCHMARKS = {
    "omniglot": Files(
        "FullOmniglot",
        [f"omniglot-py/images_{p}{e}" for p in ("background", "evaluation") for e in ("", ".zip")],
        28,
    ),
    "mini-imagenet": Files(
        "MiniImagenet", [f"mini-imagenet-cache-{split}.pkl" for split in SPLITS.values()], 84
    ),
    "tiered-imagenet": Files(
        "TieredImagenet",
        [f"tiered-imagenet/{s}_{what}.pkl" for s in SPLITS for what in ("images_png", "labels")],
        84,
    ),
    "fc100": Files("FC100", [f"FC100_{split}.pickle" for split in SPLITS], 32),
    "cifarfs": Files("CIFARFS", [f"cifarfs/processed/{split}" for split in SPLITS], 32),
}


Benchmark = Literal["omniglot", "mini-imagenet", "tiered-imagenet", "fc100", "cifarfs"]


@settings
class L2lDataConfig:
    """The data sets of learn2learn's benchmarks, read by learn2learn."""

    benchmark: Benchmark = "omniglot"  # its name there
    root: str | None = None  # the folder that learn2learn gets as its root
    split_seed: int = 0  # omniglot: random.seed before learn2learn divides the characters
    rotations: bool = True  # omniglot: characters turned by 90, 180, 270 degrees are classes too

    def __post_init__(self) -> None:
        self.root = absolute(self.root)


@builds(L2lDataConfig)
def l2l(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: L2lDataConfig
) -> ImageEpisodes:
    """Episodes of the pictures: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(L2lDataConfig)
def found(own: L2lDataConfig) -> str:
    """Where the files are."""
    return ", ".join(map(str, _files(own)))


@reads(L2lDataConfig)
def inputs(own: L2lDataConfig) -> Inputs:
    """What a network gets of a picture: of a square one the same as `load` gives."""
    drawn = own.benchmark == "omniglot"
    how = "pad" if drawn else "stretch"
    color = "grey" if drawn else "rgb"
    side = BENCHMARKS[own.benchmark].side
    return Inputs(Preprocessing(side, how, filter="lanczos", color=color), inverted=drawn)


def load(own: L2lDataConfig) -> dict[str, ClassStore]:
    """The pictures of each split; converted once and cached.

    Raises:
        ConfigError: learn2learn is not installed.
        DataError: its files are not there, or damaged.
    """
    files = _files(own)
    state = hashlib.sha256(b"".join(_state(path) for path in files)).hexdigest()[:16]

    def store(part: str, build: Callable[[], ClassStore]) -> ClassStore:
        return cached(cache_dir() / f"l2l-v1-{own.benchmark}-{part}-{state}.safetensors", build)

    if own.benchmark == "omniglot":
        every = store("all", lambda: _omniglot(own))
        numbers = list(range(len(every.class_names)))
        random.Random(own.split_seed).shuffle(numbers)
        first, last = OMNIGLOT_SPLIT
        parts = {"train": numbers[:first], "val": numbers[first:last], "test": numbers[last:]}
        stores = {split: select_classes(every, sorted(chosen)) for split, chosen in parts.items()}
        return {s: with_rotations(one) if own.rotations else one for s, one in stores.items()}
    return {split: store(split, partial(_split, own, split)) for split in SPLITS}


def _files(own: L2lDataConfig) -> list[Path]:
    """The files of the benchmark.

    Raises:
        ConfigError: learn2learn is not installed.
        DataError: some are not there.
    """
    if importlib.util.find_spec("learn2learn") is None:
        raise ConfigError(
            "data=l2l needs learn2learn, which is not installed: see its own notes on "
            "installation; data=omniglot, mini_imagenet, tiered_imagenet, fc100 and cifar_fs read "
            "the same files without it"
        )
    root = home(own.root)
    files = [root / name for name in BENCHMARKS[own.benchmark].there]
    if lost := [str(path.relative_to(root)) for path in files if not path.exists()]:
        raise DataError(
            f"data.benchmark={own.benchmark}: {root} has no {', '.join(lost)}; learn2learn fetches "
            f"them by learn2learn.vision.benchmarks.get_tasksets({own.benchmark!r}, root=…); then "
            "set data.root=<that root>"
        )
    return files


def _state(path: Path) -> bytes:
    """A name for the state of a file, or of those in a folder."""
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    told = []
    for one in below:
        status = one.stat()
        told.append(f"{one} {status.st_size} {status.st_mtime_ns}\n")
    return "".join(told).encode()


def _omniglot(own: L2lDataConfig) -> ClassStore:
    """All characters, in the order in which learn2learn numbers them, 28×28 and ink = 255."""
    with _reading(own) as open_as:
        data = open_as()
        names = [name for part in data.dataset.datasets for name in part._characters]
        return _store(data, _inverted, names)


def _split(own: L2lDataConfig, split: str) -> ClassStore:
    """The pictures of a split of the other benchmarks."""
    with _reading(own) as open_as:
        data = open_as(mode=SPLITS[split])
        names = getattr(data, "class_idx", None) or getattr(data, "classes", None)
        return _store(data, _as_rgb, None if names is None else list(names), otherwise=split)


@contextmanager
def _reading(own: L2lDataConfig) -> Iterator[Callable[..., Any]]:
    """Gives learn2learn's class of the benchmark, with its root.

    Raises:
        DataError: its files are damaged, or hold more than values.
    """
    from learn2learn.vision import datasets  # takes seconds to import

    benchmark, root = BENCHMARKS[own.benchmark], home(own.root)
    try:
        for name in benchmark.there:
            # learn2learn runs whatever its pickles say. This reader runs nothing, and refuses what
            # is no value: data.root may come out of a checkpoint that somebody else has made.
            if name.endswith((".pkl", ".pickle")):
                read_pickle(root / name)
        yield partial(getattr(datasets, benchmark.reader), str(root), download=False)
    except UntrustedError as error:
        raise DataError(f"{root}: {error}") from error
    except Exception as error:  # damage has many types in these libraries
        raise DataError(f"learn2learn cannot read {root}: {first_line(error)[:200]}") from error


def _inverted(drawing: Image.Image) -> Pixels:
    side = BENCHMARKS["omniglot"].side
    return np.array(ImageChops.invert(drawing.resize((side, side), Image.Resampling.LANCZOS)))


def _as_rgb(image: Any) -> Pixels:
    """A picture of Pillow, or a tensor (3, height, width) from 0 to 255, as (height, width, 3)."""
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    return np.array(image.permute(1, 2, 0).to(torch.uint8))


def _store(
    data: Any,
    pixels: Callable[[Any], Pixels],
    names: list[str] | None,
    otherwise: str = "",
) -> ClassStore:
    """The pictures of a data set class by class.

    Args:
        data: gives a picture and the number of its class for each number.
        pixels: of a picture: (height, width) or (height, width, channels).
        names: of the classes by number; None: they are called `otherwise` and their number.
    """
    images, labels = [], []
    for number in tqdm(range(len(data)), "reading by learn2learn", unit="picture", disable=None):
        image, label = data[number]
        values = torch.from_numpy(pixels(image))
        images.append(values.view(*values.shape[:2], -1).permute(2, 0, 1))
        labels.append(int(label))
    numbers, count = np.unique(labels, return_counts=True)
    called = [names[c] if names else f"{otherwise}-{c}" for c in numbers.tolist()]
    ordered = [images[place] for place in np.argsort(labels, kind="stable")]
    return from_sizes(torch.stack(ordered), torch.from_numpy(count), called)
