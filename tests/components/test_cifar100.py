"""CIFAR-FS and FC100: the layouts of CIFAR-100, its download, and what is no CIFAR-100."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from metarun.components.data import cifar_fs, fc100
from metarun.components.data._cifar100 import FOLDER, load_or_download
from metarun.components.data._class_lists import ClassList
from metarun.components.data.cifar_fs import CifarFsConfig
from metarun.components.data.fc100 import Fc100Config
from metarun.errors import DataError
from tests.components.published import (
    bare,
    drawn,
    of_split,
    opened,
    same,
    write_pngs,
    write_python2,
)

# One class is called `train`, as is the folder of a split.
CLASSES = ClassList(
    {
        "train": ["fish/ray", "fish/shark", "vehicles/train"],
        "val": ["people/boy"],
        "test": ["fish/trout"],
    },
    {},
)
FINE = sorted(bare(name) for own in CLASSES.splits.values() for name in own)
COARSE = ["fish", "people", "vehicles"]
PICTURES = drawn(CLASSES, 32)
BENCHMARK = cifar_fs.published(CLASSES, per_class=2)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def torchvision(folder: Path) -> None:
    """Krizhevsky's files: of each class one picture for training and one for the test."""
    for number, part in enumerate(("train", "test")):
        names = [*PICTURES]
        planes = [PICTURES[name][number].transpose(2, 0, 1).reshape(-1) for name in names]
        write_python2(
            folder / part,
            {
                "filenames": [f"{bare(name)}_{number}.png" for name in names],
                "batch_label": f"{part}ing batch 1 of 1",
                "fine_labels": [FINE.index(bare(name)) for name in names],
                "coarse_labels": [COARSE.index(name.split("/")[0]) for name in names],
                "data": np.stack(planes),
            },
        )
    write_python2(folder / "meta", {"fine_label_names": FINE, "coarse_label_names": COARSE})


def pickles(folder: Path, name: str = "CIFAR_FS_{}.pickle", as_list: bool = False) -> None:
    """The pickles of MetaOptNet: labels are numbers of CIFAR-100."""
    for split, names in CLASSES.splits.items():
        images, labels = of_split(CLASSES, PICTURES, split)
        numbers = [FINE.index(bare(names[label])) for label in labels]
        data = [*images] if as_list else images
        write_python2(folder / name.format(split), {"data": data, "labels": numbers})


def class_folders(folder: Path) -> None:
    """The folders of Bertinetto et al. 2019."""
    for name, pictures in PICTURES.items():
        write_pngs(folder / "cifar100" / "data" / bare(name), pictures)
    for split, names in CLASSES.splits.items():
        own = folder / "cifar100" / "splits" / "bertinetto" / f"{split}.txt"
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text("".join(f"{bare(name)}\n" for name in names))


def split_folders(folder: Path) -> None:
    """What learn2learn makes of them."""
    for split, names in CLASSES.splits.items():
        for name in names:
            write_pngs(folder / "processed" / split / bare(name), PICTURES[name])


LAYOUTS = {
    "torchvision": lambda folder: torchvision(folder / FOLDER),
    "torchvision, the folder itself": torchvision,
    "pickles": pickles,
    "pickles of lists": lambda folder: pickles(folder / "CIFAR-FS", as_list=True),
    "class folders": class_folders,
    "class folders of learn2learn": lambda folder: class_folders(folder / "cifarfs"),
    "split folders": lambda folder: split_folders(folder / "cifarfs"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_pictures(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "data")
    own = CifarFsConfig(root=str(tmp_path / "data"))
    same(opened(BENCHMARK, own), CLASSES, PICTURES)


def test_fc100_has_files_of_its_own_name(tmp_path: Path) -> None:
    pickles(tmp_path / "data", "FC100_{}.pickle")
    benchmark = fc100.published(CLASSES, per_class=2)
    same(opened(benchmark, Fc100Config(root=str(tmp_path / "data"))), CLASSES, PICTURES)
    with pytest.raises(DataError, match="CIFAR-FS is not in"):
        opened(BENCHMARK, CifarFsConfig(root=str(tmp_path / "data")))


def test_the_labels_of_fc100_are_the_numbers_of_cifar100() -> None:
    """The labels that FC100_train.pickle has, as people have printed them."""
    printed = (
        "0 1 5 8 9 10 12 13 16 17 20 22 23 25 27 28 29 32 33 37 39 40 41 44 47 48 49 51 52 53 54 "
        "56 57 58 59 60 61 62 67 68 69 70 71 73 76 78 81 82 83 84 85 86 87 89 90 91 92 93 94 96"
    )
    splits = fc100.published().splits
    every = sorted(bare(name) for own in splits.values() for name in own)
    assert sorted(every.index(bare(name)) for name in splits["train"]) == [
        int(number) for number in printed.split()
    ]


def test_labels_of_other_classes_are_refused(tmp_path: Path) -> None:
    pickles(tmp_path)
    images, labels = of_split(CLASSES, PICTURES, "val")
    write_python2(tmp_path / "CIFAR_FS_val.pickle", {"data": images, "labels": [*labels[:-1], 3]})
    with pytest.raises(
        DataError, match=r"CIFAR_FS_val.pickle: no class of this split has number 3"
    ):
        opened(BENCHMARK, CifarFsConfig(root=str(tmp_path)))


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path)
    write_pngs(tmp_path / "cifar100" / "data" / "ray", PICTURES["fish/ray"][:, :28])
    with pytest.raises(DataError, match=r"ray/00000000.png: it has 32x28 pixels, not 32x32"):
        opened(BENCHMARK, CifarFsConfig(root=str(tmp_path)))


def test_half_of_the_files_of_torchvision_are_refused(tmp_path: Path) -> None:
    torchvision(tmp_path)
    (tmp_path / "test").unlink()
    with pytest.raises(DataError, match="test is missing"):
        opened(BENCHMARK, CifarFsConfig(root=str(tmp_path)))
    torchvision(tmp_path)
    (tmp_path / "train").write_bytes((tmp_path / "train").read_bytes()[:900])
    with pytest.raises(DataError, match="train is cut short"):
        opened(BENCHMARK, CifarFsConfig(root=str(tmp_path)))


def stand_in(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """In place of torchvision's data set: it puts the files there, or fails."""
    asked: list[str] = []

    def fetch(root: str, download: bool) -> None:
        asked.append(root)
        if error is not None:
            raise error
        torchvision(Path(root) / FOLDER)

    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR100=fetch))
    return asked


def test_what_is_missing_is_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stand_in(monkeypatch, None)
    own = CifarFsConfig(root=str(tmp_path / "data"))
    same(load_or_download(BENCHMARK, own), CLASSES, PICTURES)
    same(load_or_download(BENCHMARK, own), CLASSES, PICTURES)
    assert len(asked) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == [FOLDER]


def test_nothing_is_downloaded_where_it_is_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stand_in(monkeypatch, None)
    for own in (
        CifarFsConfig(root=str(tmp_path / "data"), download=False),
        CifarFsConfig(root=str(tmp_path / "data"), layout="pickle"),
    ):
        with pytest.raises(DataError, match=r"data.download=true fetches CIFAR-100"):
            load_or_download(BENCHMARK, own)
    assert asked == [] and not (tmp_path / "data").exists()


def test_a_download_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, OSError("no network"))
    with pytest.raises(DataError, match=r"(?s)The download failed: no network.*Any of these"):
        load_or_download(BENCHMARK, CifarFsConfig(root=str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()
