"""CIFAR-100 for few-shot learning: the layouts, the download, and what its two splits share."""

import http.client
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from metarun.components.data._benchmarks import BenchmarkConfig, read_source
from metarun.components.data._class_lists import ClassList
from metarun.components.data._data_root import home, move, timeout
from metarun.components.data._finding import Benchmark, find, missing
from metarun.components.data._layouts import (
    Layout,
    in_class_folders,
    in_files,
    in_split_folders,
    labels_of,
    record,
)
from metarun.components.data._parts import by_class, pixel_parts
from metarun.config.component import settings
from metarun.episodes.store import ClassStore
from metarun.errors import DataError
from metarun.pictures.listing import Listing, Picture, listed

SIDE = 32  # pixels
PER_CLASS = 600  # 500 of the training set, 100 of the test set
FOLDER = "cifar-100-python"  # torchvision's name, so that a folder serves both programs

LayoutName = Literal["auto", "torchvision", "pickle", "splits", "classes"]


@settings
class Cifar100Config(BenchmarkConfig):
    """Where the files of CIFAR-100 are, and how they are split."""

    layout: LayoutName = "auto"  # how its files lie; auto: as it looks
    download: bool = True  # fetch CIFAR-100 (169 MB) if it is not there
    size: int = SIDE  # pixels of each side


def benchmark_of(
    name: str,
    title: str,
    folders: Sequence[str],
    pickles: str,
    classes: ClassList,
    per_class: int = PER_CLASS,
) -> Benchmark:
    """A split of CIFAR-100.

    Args:
        name, title, folders: see `Benchmark`.
        pickles: the names of its own files, with {} for the split.
        classes: "superclass/class" of each split; all 100 of them.
        per_class: pictures of each class.
    """
    every = sorted(name.split("/")[-1] for own in classes.splits.values() for name in own)
    train = [name.split("/")[-1] for name in classes.splits["train"]]
    what = pickles.replace("{}", "{train,val,test}")
    return Benchmark(
        name=name,
        title=title,
        folders=(*folders, "cifar100", FOLDER),
        inner=(FOLDER, "cifar100/data", "data", "cifar100/cifar100/data", "processed"),
        splits=classes.splits,
        per_class=per_class,
        side=SIDE,
        layouts={
            "torchvision": Layout(
                f"{FOLDER}/{{train,test,meta}}, as torchvision has CIFAR-100",
                lambda folder: [
                    folder / part
                    for part in ("train", "test", "meta")
                    if (folder / "meta").is_file() and (folder / part).is_file()
                ],
                read_torchvision,
            ),
            "pickle": in_files(f"{what} (data, labels)", [pickles], numbered(classes, every)),
            "splits": in_split_folders("{train,val,test}/<class>/*.png", train),
            "classes": in_class_folders("cifar100/data/<class>/*.png", every),
        },
        source="data.download=true fetches CIFAR-100 (169 MB).",
    )


def load_or_download(benchmark: Benchmark, own: Cifar100Config) -> dict[str, ClassStore]:
    """The pictures of each split.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once.
    """
    root = home(own.root)
    try:
        source = find(benchmark, root, own.layout)
    except DataError:
        if not own.download or own.layout not in ("auto", "torchvision"):
            raise
        download(benchmark, root)
        source = find(benchmark, root, "torchvision")
    return read_source(benchmark, source, own)


def download(benchmark: Benchmark, root: Path) -> None:
    """Fetch CIFAR-100 by torchvision, put in its place whole or not at all.

    Raises:
        DataError: the network or the disk failed; it says what else can be done.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        from torchvision.datasets import CIFAR100  # takes seconds to import

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as draft, timeout():
            CIFAR100(draft, download=True)
            move(Path(draft) / FOLDER, root / FOLDER)
    except (OSError, RuntimeError, ImportError, http.client.HTTPException) as error:
        for folder in made:  # innermost first
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise DataError(f"The download failed: {error}.\n{missing(benchmark, root)}") from error


def read_torchvision(folder: Path) -> Listing:
    """The pictures of Krizhevsky's own files, those for training before those for the test.

    Raises:
        DataError: a file is missing or damaged, or holds something else.
    """
    for part in ("train", "test"):
        if not (folder / part).is_file():
            raise DataError(f"{folder / part} is missing")
    fine, coarse = record(folder / "meta", "fine_label_names", "coarse_label_names")
    classes: dict[str, list[Picture]] = {}
    group: dict[int, int] = {}
    for part in ("train", "test"):
        path = folder / part
        images, labels, groups = record(path, "data", "fine_labels", "coarse_labels")
        pictures = pixel_parts(path, images, SIDE, "planes")
        numbers = labels_of(path, labels, len(pictures), range(len(fine)))
        of_groups = labels_of(path, groups, len(pictures), range(len(coarse)))
        for number, own in zip(numbers, of_groups, strict=True):
            if group.setdefault(number, own) != own:
                raise DataError(f"{path}: class {fine[number]} is in two superclasses")
        names = {number: f"{coarse[own]}/{fine[number]}" for number, own in group.items()}
        for name, some in by_class(pictures, numbers, names).items():
            classes.setdefault(name, []).extend(some)
    return listed(folder, FOLDER, classes)


def numbered(
    classes: ClassList, every: Sequence[str]
) -> Callable[[str, list[Path]], dict[str, list[Picture]]]:
    """What reads a split whose labels are the numbers that the classes have in CIFAR-100.

    Args:
        classes: of each split.
        every: all 100 in the order of CIFAR-100, which is that of the alphabet.
    """

    def read(split: str, files: list[Path]) -> dict[str, list[Picture]]:
        (path,) = files
        images, labels = record(path, "data", "labels")
        pictures = pixel_parts(path, images, SIDE)
        names = {every.index(name.split("/")[-1]): name for name in classes.splits[split]}
        return by_class(pictures, labels_of(path, labels, len(pictures), names), names)

    return read
