"""CUB: its layouts and its two splits."""

import json
import shutil
from pathlib import Path

import pytest

from metarun.components.data._class_lists import ClassList
from metarun.components.data.cub import CubConfig, found, load, published
from metarun.errors import DataError
from tests.components.published import drawn, opened, same, write_pngs

CLASSES = ClassList(
    {
        "train": ["001.Black_footed_Albatross", "003.Sooty_Albatross"],
        "val": ["002.Laysan_Albatross"],
        "test": ["004.Groove_billed_Ani"],
    },
    {},
)
PICTURES = drawn(CLASSES, 84)
BENCHMARK = published("100-50-50", CLASSES, total=8)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def class_folders(folder: Path) -> None:
    """What CUB_200_2011.tgz has."""
    for name, pictures in PICTURES.items():
        write_pngs(folder / "CUB_200_2011" / "images" / name, pictures)
    (folder / "CUB_200_2011" / "README").write_text("birds")


def closer_look(folder: Path) -> None:
    """The tables of Chen et al. 2019."""
    class_folders(folder / "birds")
    for split, file in (("train", "base"), ("val", "val"), ("test", "novel")):
        names = CLASSES.splits[split]
        images = folder / "birds" / "CUB_200_2011" / "images"
        table = {
            "label_names": names,
            "image_names": [str(images / n / f"0000000{i}.png") for n in names for i in (0, 1)],
            "image_labels": [number for number in range(len(names)) for _ in (0, 1)],
        }
        (folder / f"{file}.json").write_text(json.dumps(table))


def easy_set(folder: Path) -> None:
    """The tables of easyfsl; names are without numbers."""
    class_folders(folder / "birds")
    for split, names in CLASSES.splits.items():
        images = folder / "birds" / "CUB_200_2011" / "images"
        table = {
            "class_names": [name.partition(".")[2] for name in names],
            "class_roots": [str(images / name) for name in names],
        }
        (folder / f"{split}.json").write_text(json.dumps(table))


def split_folders(folder: Path) -> None:
    for split, names in CLASSES.splits.items():
        for name in names:
            write_pngs(folder / split / name, PICTURES[name])


LAYOUTS = {
    "class folders": class_folders,
    "class folders of learn2learn": lambda folder: class_folders(folder / "cubirds200"),
    "images alone": lambda folder: (
        class_folders(folder / "x")
        or shutil.move(folder / "x" / "CUB_200_2011" / "images", folder / "images")
    ),
    "closer look": closer_look,
    "easy set": easy_set,
    "split folders": lambda folder: split_folders(folder / "CUB"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_pictures(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path / "data")
    same(opened(BENCHMARK, CubConfig(root=str(tmp_path / "data"))), CLASSES, PICTURES)


def test_the_archive_of_the_authors_is_read(tmp_path: Path) -> None:
    class_folders(tmp_path / "packed")
    made = shutil.make_archive(str(tmp_path / "x"), "gztar", tmp_path / "packed")
    (tmp_path / "data").mkdir()
    shutil.move(made, tmp_path / "data" / "CUB_200_2011.tgz")
    same(opened(BENCHMARK, CubConfig(root=str(tmp_path / "data"))), CLASSES, PICTURES)


def test_folders_of_the_other_split_are_refused(tmp_path: Path) -> None:
    split_folders(tmp_path / "data")
    other = ClassList(
        {**CLASSES.splits, "val": CLASSES.splits["test"], "test": CLASSES.splits["val"]}, {}
    )
    with pytest.raises(DataError, match=r"002.* is in val, not in test; 004.* is in test, not"):
        opened(published("140-30-30", other, total=8), CubConfig(root=str(tmp_path / "data")))


def test_a_lost_picture_is_missed(tmp_path: Path) -> None:
    class_folders(tmp_path / "data")
    next((tmp_path / "data").rglob("*.png")).unlink()
    with pytest.raises(DataError, match=r"there are 7 pictures, not 8"):
        opened(BENCHMARK, CubConfig(root=str(tmp_path / "data")))


def test_the_published_birds_are_asked_for(tmp_path: Path) -> None:
    for names in published("140-30-30").splits.values():
        for name in names:
            write_pngs(
                tmp_path / "CUB_200_2011" / "images" / name, PICTURES[CLASSES.splits["val"][0]]
            )
    own = CubConfig(root=str(tmp_path), split="140-30-30")
    place = tmp_path / "CUB_200_2011" / "images"
    assert found(own) == f"{place} (CUB_200_2011/images/<class>/*.jpg)"
    with pytest.raises(DataError, match="there are 400 pictures, not 11,788"):
        load(own)


def test_the_two_splits_have_the_same_birds() -> None:
    one, other = published("100-50-50").splits, published("140-30-30").splits
    birds = [sorted(name for own in splits.values() for name in own) for splits in (one, other)]
    assert birds[0] == birds[1]
    assert [len(own) for own in one.values()] == [100, 50, 50]
    assert [len(own) for own in other.values()] == [140, 30, 30]
