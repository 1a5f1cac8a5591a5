"""mini-ImageNet: its layouts, and what is no mini-ImageNet."""

import csv
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from metarun.components.data._class_lists import ClassList
from metarun.components.data.mini_imagenet import MiniImagenetConfig, published
from metarun.errors import ConfigError, DataError
from tests.components.published import (
    drawn,
    of_split,
    opened,
    same,
    write_pngs,
    write_python2,
)

CLASSES = ClassList({"train": ["n01", "n02", "n03"], "val": ["n04", "n05"], "test": ["n06"]}, {})
BENCHMARK = published(CLASSES, per_class=2)
PICTURES = drawn(CLASSES, 84)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def cache(folder: Path, val: str = "val") -> None:
    """The pickles of Ren et al. 2018."""
    for split, name in (("train", "train"), ("val", val), ("test", "test")):
        images, labels = of_split(CLASSES, PICTURES, split)
        numbers = {
            own: [i for i, label in enumerate(labels) if label == number]
            for number, own in enumerate(CLASSES.splits[split])
        }
        write_python2(
            folder / f"mini-imagenet-cache-{name}.pkl",
            {"image_data": images, "class_dict": numbers},
        )


def categories(folder: Path) -> None:
    """The pickles of Gidaris and Komodakis 2018: labels go on from split to split."""
    first = 0
    for split, name in (("train", "train_phase_train"), ("val", "val"), ("test", "test")):
        images, labels = of_split(CLASSES, PICTURES, split)
        numbers = {own: first + number for number, own in enumerate(CLASSES.splits[split])}
        write_python2(
            folder / f"miniImageNet_category_split_{name}.pickle",
            {"catname2label": numbers, "labels": [first + n for n in labels], "data": images},
        )
        first += len(numbers)


def tables(folder: Path, inside: str = "") -> None:
    """Ravi's tables, and pictures in one folder."""
    for split, names in CLASSES.splits.items():
        (folder / inside).mkdir(parents=True, exist_ok=True)
        with open(folder / inside / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filename", "label"])
            for name in names:
                files = write_pngs(folder / "images", PICTURES[name], name)
                writer.writerows([file, name] for file in files)


def split_folders(folder: Path) -> None:
    for split, names in CLASSES.splits.items():
        for name in names:
            write_pngs(folder / split / name, PICTURES[name])


def class_folders(folder: Path) -> None:
    for name in PICTURES:
        write_pngs(folder / name, PICTURES[name])


def filelists(folder: Path) -> None:
    """The tables of Chen et al. 2019, whose paths are those of another machine."""
    class_folders(folder / "pictures")
    for split, file in (("train", "base"), ("val", "val"), ("test", "novel")):
        names = CLASSES.splits[split]
        table = {
            "label_names": names,
            "image_names": [
                f"/elsewhere/pictures/{n}/0000000{i}.png" for n in names for i in (0, 1)
            ],
            "image_labels": [number for number in range(len(names)) for _ in (0, 1)],
        }
        (folder / f"{file}.json").write_text(json.dumps(table))


LAYOUTS = {
    "cache": cache,
    "cache of learn2learn": lambda folder: cache(folder, "validation"),
    "categories": categories,
    "tables": tables,
    "tables in split": lambda folder: tables(folder, "split"),
    "split folders": split_folders,
    "class folders": class_folders,
    "filelists": filelists,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_pictures(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "data")
    own = MiniImagenetConfig(root=str(tmp_path / "data"))
    same(opened(BENCHMARK, own), CLASSES, PICTURES)


@pytest.mark.parametrize("place", ["miniImageNet", "mini-imagenet/mini-imagenet"])
def test_a_folder_that_is_called_so_is_looked_into(place: str, tmp_path: Path) -> None:
    split_folders(tmp_path / "data" / place)
    own = MiniImagenetConfig(root=str(tmp_path / "data"))
    same(opened(BENCHMARK, own), CLASSES, PICTURES)


@pytest.mark.parametrize("ending", ["tar.gz", "tar", "zip"])
def test_an_archive_of_any_layout_is_unpacked_and_left_as_it_was(
    ending: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    cache(tmp_path / "packed")
    kind = {"tar.gz": "gztar"}.get(ending, ending)
    shutil.make_archive(str(root / "mini-imagenet"), kind, tmp_path / "packed")
    own = MiniImagenetConfig(root=str(root))
    same(opened(BENCHMARK, own), CLASSES, PICTURES)
    assert [path.name for path in root.iterdir()] == [f"mini-imagenet.{ending}"]
    assert not [*(tmp_path / "cache").glob(".*.unpacked")]
    shutil.move(root / f"mini-imagenet.{ending}", tmp_path / "there")
    with pytest.raises(DataError, match="is not in"):
        opened(BENCHMARK, own)
    shutil.move(tmp_path / "there", root / f"mini-imagenet.{ending}")
    same(opened(BENCHMARK, own), CLASSES, PICTURES)  # by its size and time


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "mini-imagenet.zip", "w") as archive:
        archive.writestr("../../outside", "x")
    with pytest.raises(DataError, match="not safe to unpack"):
        opened(BENCHMARK, MiniImagenetConfig(root=str(tmp_path / "data")))
    (tmp_path / "data" / "mini-imagenet.zip").unlink()
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "data" / "mini-imagenet.tar", "w") as archive:
        archive.add(tmp_path / "x", "../../outside")
    with pytest.raises(DataError, match="not safe to unpack"):
        opened(BENCHMARK, MiniImagenetConfig(root=str(tmp_path / "data")))
    (tmp_path / "data" / "mini-imagenet.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match="is damaged"):
        opened(BENCHMARK, MiniImagenetConfig(root=str(tmp_path / "data")))


def test_nothing_is_guessed(tmp_path: Path) -> None:
    own = MiniImagenetConfig(root=str(tmp_path / "data"))
    with pytest.raises(DataError, match="There is no such folder"):
        opened(BENCHMARK, own)
    (tmp_path / "data" / "something").mkdir(parents=True)
    with pytest.raises(DataError, match=r"(?s)It has: something.*mini-imagenet-cache.*csv.*Net id"):
        opened(BENCHMARK, own)
    cache(tmp_path / "data")
    tables(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"(?s)more than once.*layout=cache.*layout=csv"):
        opened(BENCHMARK, own)
    own.layout = "csv"
    same(opened(BENCHMARK, own), CLASSES, PICTURES)
    for name in ("miniImageNet.zip", "mini_imagenet.tar"):
        (tmp_path / "archives").mkdir(exist_ok=True)
        (tmp_path / "archives" / name).touch()
    with pytest.raises(ConfigError, match=r"(?s)more than once; keep one:.*: an archive"):
        opened(BENCHMARK, MiniImagenetConfig(root=str(tmp_path / "archives")))
    for name in ("mini-imagenet", "miniImageNet"):
        cache(tmp_path / "data" / name)
    own.layout = "auto"
    with pytest.raises(ConfigError, match=r"(?s)more than once; say which with data.root=…"):
        opened(BENCHMARK, own)


def change(path: Path, **values: object) -> None:
    """The same pickle with other values, by Python 3; without those that are None."""
    with open(path, "rb") as file:
        record = pickle.load(file, encoding="latin1")
    with open(path, "wb") as file:
        pickle.dump(
            {key: value for key, value in (record | values).items() if value is not None}, file
        )


WRONG = {
    "has class_dict, but no image_data": {"image_data": None},
    r"shape \(6, 80, 84, 3\) \(uint8\), which should be \(6, 84, 84, 3\)": {
        "image_data": np.zeros((6, 80, 84, 3), np.uint8)
    },
    r"\(float32\), which should be": {"image_data": np.zeros((6, 84, 84, 3), np.float32)},
    "pictures are no array": {"image_data": "none"},
    "class_dict is no dictionary": {"class_dict": [1, 2]},
    "no picture has number 6": {"class_dict": {"n01": [0, 6]}},
    "a picture has no whole number": {"class_dict": {"n01": [0.5, 6]}},
    r"2 classes \(n02, n03\) are missing": {"class_dict": {"n01": [0, 3]}},
    "n03 has 1 pictures, not 2": {"class_dict": {"n01": [0, 3], "n02": [1, 4], "n03": [2]}},
    "class n99 is no class of it": {
        "class_dict": {"n01": [0, 3], "n02": [1, 4], "n03": [2, 5], "n99": [0, 1]}
    },
    "n04 is in train, not in val": {
        "class_dict": {"n01": [0, 3], "n02": [1, 4], "n03": [2, 5], "n04": [2, 5]}
    },
    "has a picture twice": {"class_dict": {"n01": [0, 0], "n02": [1, 4], "n03": [2, 5]}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_pickle_that_is_no_mini_imagenet_is_refused(message: str, tmp_path: Path) -> None:
    cache(tmp_path / "data")
    change(tmp_path / "data" / "mini-imagenet-cache-train.pkl", **WRONG[message])
    if "n04" in message:
        change(tmp_path / "data" / "mini-imagenet-cache-val.pkl", class_dict={"n05": [1, 3]})
    with pytest.raises(DataError, match=message):
        opened(BENCHMARK, MiniImagenetConfig(root=str(tmp_path / "data")))
    assert not [*(tmp_path / "cache").glob("*.safetensors")]


def test_damaged_and_missing_pickles_are_named(tmp_path: Path) -> None:
    own = MiniImagenetConfig(root=str(tmp_path / "data"))
    cache(tmp_path / "data")
    path = tmp_path / "data" / "mini-imagenet-cache-test.pkl"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=r"mini-imagenet-cache-test.pkl is cut short"):
        opened(BENCHMARK, own)
    path.unlink()
    with pytest.raises(DataError, match=r"mini-imagenet-cache-test.pkl is missing"):
        opened(BENCHMARK, own)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"mini-imagenet-cache-test.pkl is damaged, or no pickle"):
        opened(BENCHMARK, own)
    categories(tmp_path / "data" / "mini-imagenet")
    change(
        tmp_path / "data" / "mini-imagenet" / "miniImageNet_category_split_val.pickle",
        catname2label=None,
    )
    with pytest.raises(DataError, match="has labels, data, but no catname2label"):
        opened(BENCHMARK, own)


def test_the_same_files_are_converted_once_and_others_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = MiniImagenetConfig(root=str(tmp_path / "data"))
    cache(tmp_path / "data")
    first = opened(BENCHMARK, own)
    monkeypatch.setattr("metarun.components.data._benchmarks.convert", None)
    assert opened(BENCHMARK, own)["train"].identity == first["train"].identity
    monkeypatch.undo()
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data" / "mini-imagenet-cache-train.pkl"
    change(path, image_data=255 - of_split(CLASSES, PICTURES, "train")[0])
    assert opened(BENCHMARK, own)["train"].identity != first["train"].identity
    assert opened(BENCHMARK, own)["test"].images.shape == first["test"].images.shape


def test_pictures_are_stretched_to_the_size_that_is_asked_for(tmp_path: Path) -> None:
    cache(tmp_path / "data")
    own = MiniImagenetConfig(root=str(tmp_path / "data"), size=28, color="grey")
    assert opened(BENCHMARK, own)["val"].images.shape == (4, 1, 28, 28)
