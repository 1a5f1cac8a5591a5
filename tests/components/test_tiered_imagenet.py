"""tiered-ImageNet: its layouts, and what is no tiered-ImageNet."""

from pathlib import Path

import numpy as np
import pytest

from metarun.components.data._class_lists import ClassList
from metarun.components.data.tiered_imagenet import TieredImagenetConfig, published
from metarun.errors import ConfigError, DataError
from tests.components.published import (
    bare,
    drawn,
    of_split,
    opened,
    png,
    same,
    write_pngs,
    write_python2,
)

CLASSES = ClassList(
    {"train": ["n1/n11", "n1/n12", "n2/n21"], "val": ["n3/n31"], "test": ["n4/n41", "n4/n42"]},
    {
        "n1/n11": "finch, Fringilla",
        "n1/n12": "crane",
        "n2/n21": "cat",
        "n3/n31": "crane",  # of another kind
        "n4/n41": "cup",
        "n4/n42": "sauce boat",
    },
)
PICTURES = drawn(CLASSES, 84)
BENCHMARK = published(CLASSES, total=12)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def labels(folder: Path, split: str, numbers: list[int], words: list[str] | None = None) -> None:
    """The labels of a split; the order of the classes is one of their own."""
    own = CLASSES.splits[split][::-1]
    last = len(own) - 1
    write_python2(
        folder / f"{split}_labels.pkl",
        {
            "label_specific": np.array([last - n for n in numbers], dtype=np.int32),
            "label_general": np.zeros(len(numbers), dtype=np.int32),
            "label_specific_str": words or [CLASSES.words[name] for name in own],
            "label_general_str": ["things"],
        },
    )


def pickles(folder: Path, columns: bool = True) -> None:
    """The pickles of Ren et al. 2018: OpenCV gave a PNG as one column, newer versions as a row."""
    for split in CLASSES.splits:
        images, numbers = of_split(CLASSES, PICTURES, split)
        files = [np.frombuffer(png(image), np.uint8) for image in images]
        shaped = [file[:, None] if columns else file for file in files]
        write_python2(folder / f"{split}_images_png.pkl", shaped)
        labels(folder, split, numbers)


def arrays(folder: Path, order: int = -1, save: object = np.savez) -> None:
    """What `decompress` of Ren et al. 2018 makes of the pickles: BGR, as OpenCV has it."""
    for split in CLASSES.splits:
        images, numbers = of_split(CLASSES, PICTURES, split)
        labels(folder, split, numbers)
        save(folder / f"{split}_images.npz", images=images[..., ::order])  # type: ignore[operator]


def test_pickled_png_files_are_read_with_the_classes_that_their_words_mean(tmp_path: Path) -> None:
    for columns in (True, False):
        folder = tmp_path / str(columns)
        pickles(folder / "tiered-imagenet", columns)
        own = TieredImagenetConfig(root=str(folder))
        same(opened(BENCHMARK, own), CLASSES, PICTURES)


def test_a_small_png_is_a_picture_too(tmp_path: Path) -> None:
    """A few hundred bytes are not kept in the file by Python 2's format, but here they are."""
    white = {name: np.full((2, 84, 84, 3), i, np.uint8) for i, name in enumerate(PICTURES)}
    for split in CLASSES.splits:
        images, numbers = of_split(CLASSES, white, split)
        write_python2(
            tmp_path / f"{split}_images_png.pkl",
            [np.frombuffer(png(image), np.uint8) for image in images],
        )
        labels(tmp_path, split, numbers)
    same(opened(BENCHMARK, TieredImagenetConfig(root=str(tmp_path))), CLASSES, white)


@pytest.mark.parametrize(("channels", "order"), [("bgr", -1), ("rgb", 1)])
def test_arrays_are_read_where_they_lie_once_the_order_of_channels_is_said(
    channels: str, order: int, tmp_path: Path
) -> None:
    arrays(tmp_path, order)
    benchmark = published(CLASSES, total=12, npz_channels=channels)
    same(opened(benchmark, TieredImagenetConfig(root=str(tmp_path))), CLASSES, PICTURES)


def test_arrays_whose_order_of_channels_is_unknown_are_refused(tmp_path: Path) -> None:
    arrays(tmp_path)
    with pytest.raises(ConfigError, match=r"RGB or BGR: data.npz_channels=bgr if OpenCV"):
        opened(BENCHMARK, TieredImagenetConfig(root=str(tmp_path)))


def test_compressed_arrays_are_refused_with_what_they_would_need(tmp_path: Path) -> None:
    arrays(tmp_path, save=np.savez_compressed)
    benchmark = published(CLASSES, total=12, npz_channels="bgr")
    with pytest.raises(DataError, match=r"GiB would have to be in memory: write it again"):
        opened(benchmark, TieredImagenetConfig(root=str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None])
def test_a_damaged_array_is_refused(content: bytes | None, tmp_path: Path) -> None:
    arrays(tmp_path)
    path = tmp_path / "val_images.npz"
    path.write_bytes(path.read_bytes()[:-30_000] if content is None else content)
    benchmark = published(CLASSES, total=12, npz_channels="bgr")
    with pytest.raises(DataError, match=r"val_images.npz is damaged"):
        opened(benchmark, TieredImagenetConfig(root=str(tmp_path)))


def test_folders_of_imagenet_may_have_further_classes(tmp_path: Path) -> None:
    for name, pictures in PICTURES.items():
        write_pngs(tmp_path / "all" / bare(name), pictures)
    write_pngs(tmp_path / "all" / "n99", PICTURES["n1/n11"])
    same(opened(BENCHMARK, TieredImagenetConfig(root=str(tmp_path / "all"))), CLASSES, PICTURES)
    for split, names in CLASSES.splits.items():
        for name in names:
            write_pngs(tmp_path / "split" / split / bare(name), PICTURES[name])
    own = TieredImagenetConfig(root=str(tmp_path / "split"))
    same(opened(BENCHMARK, own), CLASSES, PICTURES)
    write_pngs(tmp_path / "split" / "val" / "n99", PICTURES["n1/n11"])
    with pytest.raises(DataError, match="class n99 is no class of it"):
        opened(BENCHMARK, own)


def test_pictures_that_are_lost_are_counted(tmp_path: Path) -> None:
    pickles(tmp_path)
    with pytest.raises(DataError, match="there are 12 pictures, not 779,165"):
        opened(published(CLASSES), TieredImagenetConfig(root=str(tmp_path)))


def test_labels_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    own = TieredImagenetConfig(root=str(tmp_path))
    pickles(tmp_path)
    numbers = of_split(CLASSES, PICTURES, "test")[1]
    labels(tmp_path, "test", numbers, ["sauce boat", "plate"])
    with pytest.raises(DataError, match="'plate' is no class of the test split"):
        opened(BENCHMARK, own)
    labels(tmp_path, "test", numbers[:-1])
    with pytest.raises(DataError, match="has 3 labels for 4 pictures"):
        opened(BENCHMARK, own)
    labels(tmp_path, "test", [*numbers[:-1], -7])
    with pytest.raises(DataError, match="no class of this split has number 8"):
        opened(BENCHMARK, own)


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    pickles(tmp_path)
    images, _ = of_split(CLASSES, PICTURES, "val")
    files = [np.frombuffer(png(image[:80]), np.uint8) for image in images]
    write_python2(tmp_path / "val_images_png.pkl", files)
    with pytest.raises(DataError, match=r"val_images_png.pkl .*it has 84x80 pixels, not 84x84"):
        opened(BENCHMARK, TieredImagenetConfig(root=str(tmp_path)))
