"""How pictures lie in a folder: each published layout, and what is wrong with a folder."""

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from metarun.errors import ConfigError, DataError
from metarun.pictures.layouts import LAYOUTS, list_pictures
from metarun.pictures.listing import Listing, Picture, fingerprint, listed
from tests.pictures.drawing import colour, draw, draw_classes

PARTS = {"train": ["ant", "bee", "cow"], "val": ["dog"], "test": ["eel", "fox"]}
NAMES = [name for own in PARTS.values() for name in own]
COUNT = 3


def each(what: Callable[[str, str, int, tuple[int, int, int]], None]) -> None:
    """Call `what(split, class, number, colour)` for every picture."""
    for split, own in PARTS.items():
        for name in own:
            for number in range(COUNT):
                what(split, name, number, colour(NAMES.index(name), number))


def write_table(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def splits(root: Path) -> None:
    each(lambda split, name, n, c: draw(root / split / name / f"{n}.png", c) and None)


def classes(root: Path) -> None:
    each(lambda split, name, n, c: draw(root / name / f"{n}.png", c) and None)


def split_csv(root: Path) -> None:
    """As Ravi and Larochelle's mini-ImageNet: all pictures in one folder."""
    tables: dict[str, list[list[str]]] = {split: [["filename", "label"]] for split in PARTS}

    def one(split: str, name: str, number: int, color: tuple[int, int, int]) -> None:
        draw(root / "images" / f"{name}{number:08d}.png", color)
        tables[split].append([f"{name}{number:08d}.png", name])

    each(one)
    for split, rows in tables.items():
        write_table(root / f"{split}.csv", rows)


def labels(root: Path) -> None:
    rows = [["filename", "label"]]

    def one(split: str, name: str, number: int, color: tuple[int, int, int]) -> None:
        draw(root / f"{name}_{number}.png", color)
        rows.append([f"{name}_{number}.png", name])

    each(one)
    write_table(root / "labels.csv", rows)


def meta_album(root: Path) -> None:
    rows = [["FILE_NAME", "CATEGORY", "SUPER_CATEGORY"]]

    def one(split: str, name: str, number: int, color: tuple[int, int, int]) -> None:
        draw(root / "images" / f"{name}_{number}.png", color)
        rows.append([f"{name}_{number}.png", name, "insects" if name in ("ant", "bee") else "rest"])

    each(one)
    write_table(root / "labels.csv", rows)


def closer_look(root: Path, there: Path | None = None) -> None:
    """As `write_CUB_filelist.py` writes them, with the label names of all classes in each file."""
    found: dict[str, dict[str, list[object]]] = {}

    def one(split: str, name: str, number: int, color: tuple[int, int, int]) -> None:
        path = draw(root / "pictures" / name / f"{number}.png", color)
        own = found.setdefault(split, {"image_names": [], "image_labels": []})
        own["image_names"].append(str((there or root) / path.relative_to(root)))
        own["image_labels"].append(NAMES.index(name))

    each(one)
    for split, file in {"train": "base", "val": "val", "test": "novel"}.items():
        (root / f"{file}.json").write_text(json.dumps({"label_names": NAMES} | found[split]))


def easy_set(root: Path, there: str = "") -> None:
    each(lambda split, name, n, c: draw(root / "images" / name / f"{n}.png", c) and None)
    for split, own in PARTS.items():
        roots = [f"{there or root}/images/{name}" for name in own]
        (root / f"{split}.json").write_text(json.dumps({"class_names": own, "class_roots": roots}))


WRITERS: dict[str, Callable[[Path], None]] = {
    "splits": splits,
    "classes": classes,
    "csv": split_csv,
    "labels": labels,
    "meta_album": meta_album,
    "closer_look": closer_look,
    "easy_set": easy_set,
}


def made(layout: str, root: Path) -> Path:
    root.mkdir()
    WRITERS[layout](root)
    return root


def by_class(listing: Listing) -> dict[str, list[bytes]]:
    """The content of the pictures of each class."""
    rest = iter(listing.pictures)
    return {
        name: [Path(next(rest).file).read_bytes() for _ in range(size)]
        for name, size in zip(listing.class_names, listing.sizes, strict=True)
    }


def test_every_layout_has_a_writer() -> None:
    assert LAYOUTS.keys() == WRITERS.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_found_out(layout: str, tmp_path: Path) -> None:
    wanted = by_class(list_pictures(made("classes", tmp_path / "reference")))
    root = made(layout, tmp_path / "data")
    found = list_pictures(root)
    assert by_class(found) == wanted and list_pictures(root, layout) == found
    if layout in ("classes", "labels", "meta_album"):
        assert found.splits is None
    else:
        own = found.splits
        assert own is not None
        assert {s: [found.class_names[c] for c in own[s]] for s in own} == PARTS
    if layout == "meta_album":
        assert found.groups == ("insects", "insects", "rest", "rest", "rest", "rest")


def test_other_names_of_the_validation_split(tmp_path: Path) -> None:
    root = made("splits", tmp_path / "data")
    for name in ("valid", "validation"):
        next(root.glob("val*")).rename(root / name)
        assert list_pictures(root).splits == {"train": [0, 1, 2], "val": [3], "test": [4, 5]}
    draw(root / "val" / "gnu" / "0.png", colour(6, 0))
    with pytest.raises(DataError, match="are both of the val split"):
        list_pictures(root)


def test_pictures_that_have_moved_are_found_below_the_root(tmp_path: Path) -> None:
    for number, write in enumerate(
        (
            lambda root: closer_look(root, Path("/home/somebody/filelists/CUB")),
            lambda root: easy_set(root, "./data/CUB"),
        )
    ):
        root = tmp_path / str(number)
        root.mkdir()
        write(root)
        assert len(list_pictures(root).pictures) == 18
        (root / ("pictures" if number == 0 else "images")).rename(root / "elsewhere")
        with pytest.raises(DataError, match="which is not there, nor is its end below"):
            list_pictures(root)


def test_what_systems_leave_behind_is_no_picture_and_the_rest_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = made("classes", tmp_path / "data")
    for junk in (".DS_Store", "ant/._0.png", "ant/Thumbs.db", "__MACOSX/ant/0.png"):
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(b"junk")
    before = list_pictures(root)
    assert before.class_names == tuple(NAMES) and "left out" not in caplog.text
    (root / "bee" / "notes.txt").write_text("three bees")
    (root / "readme.md").write_text("animals")
    assert list_pictures(root) == before
    assert "notes.txt is left out" in caplog.text and "1 files outside" in caplog.text
    shutil.copytree(root / "bee", root / ".cat")
    (root / ".git").mkdir()
    assert list_pictures(root) == before
    assert ".cat is left out: no class has a name that begins with a point" in caplog.text
    assert ".git" not in caplog.text


def link_to_itself(root: Path) -> None:
    (root / "ant" / "again").symlink_to(root / "ant")
    (root / "ant" / "self.png").symlink_to(root / "ant" / "self.png")
    (root / "loop").symlink_to(root / "loop")


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    root = made("classes", tmp_path / "data")
    link_to_itself(root)
    found = list_pictures(root)
    assert found.class_names == tuple(NAMES)
    with pytest.raises(OSError, match="symbolic links"):
        fingerprint(found)


def test_links_to_folders_and_pictures_are_followed(tmp_path: Path) -> None:
    wanted = by_class(list_pictures(made("classes", tmp_path / "data")))
    for name in NAMES:
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(tmp_path / "data" / name)
    assert by_class(list_pictures(tmp_path / "links")) == wanted


STRANGE = ["a class", "ключ", "名前", "é" * 127 + "e", "-x", "a=b,c", "100%"]


def test_strange_names(tmp_path: Path) -> None:
    draw_classes(tmp_path, STRANGE)
    (tmp_path / "a class" / "0.png").rename(tmp_path / "a class" / ("é" * 125 + "a.png"))
    not_unicode = os.fsdecode(b"\xff\xfe")
    draw_classes(tmp_path, [not_unicode], first=8)
    found = list_pictures(tmp_path)
    assert set(found.class_names) == {*STRANGE, not_unicode} and len(found.pictures) == 24
    assert len(fingerprint(found)) == 64


def test_the_fingerprint_sees_names_sizes_and_times(tmp_path: Path) -> None:
    root = made("classes", tmp_path / "data")
    seen = {fingerprint(list_pictures(root))}
    file = root / "ant" / "0.png"
    os.utime(file, ns=(10**18, 10**18))
    seen.add(fingerprint(list_pictures(root)))
    file.write_bytes(file.read_bytes() + b"\0")
    os.utime(file, ns=(10**18, 10**18))
    seen.add(fingerprint(list_pictures(root)))
    file.rename(root / "ant" / "3.png")
    seen.add(fingerprint(list_pictures(root)))
    (root / "ant").rename(root / "aunt")
    seen.add(fingerprint(list_pictures(root)))
    assert len(seen) == 5
    root.rename(tmp_path / "moved")
    assert fingerprint(list_pictures(tmp_path / "moved")) in seen


def test_folders_that_lie_otherwise_are_named(tmp_path: Path) -> None:
    for inner, words in {
        "animals": "pictures lie one level deeper, as in animals/ant/: give data.root=.*animals",
        "animals plants": "as in animals/ant/: move all class folders, such as ant, into .*deep",
        "Train Val test": "lower case: call Train, Val train, val",
    }.items():
        root = tmp_path / inner.replace(" ", "") / "deep"
        for number, name in enumerate(inner.split()):
            draw_classes(root / name, [f"ant{number}" if number else "ant", f"bee{number}"])
        with pytest.raises(DataError, match=words) as caught:
            list_pictures(root)
        assert "lie in no layout that metarun knows" in str(caught.value)
    with pytest.raises(DataError, match="has no folder train: folders of splits are in lower case"):
        list_pictures(root, "splits")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"It has: nothing\.\nAny of these is read"):
        list_pictures(tmp_path / "empty")


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a class in two splits": (
        "splits",
        lambda r: draw_classes(r / "test", ["ant"]),
        "class 'ant' in .* is in the train split and in the test split",
    ),
    "the same in a table": (
        "csv",
        lambda r: (r / "test.csv").write_text("filename,label\nant00000000.png,ant\n"),
        "class 'ant' in .* is in the train split and in the test split",
    ),
    "no validation split": (
        "splits",
        lambda r: (r / "val").rename(r / "more"),
        "has no folder val: move some class folders into one",
    ),
    "no class folders in a split": (
        "splits",
        lambda r: [(r / "val" / "dog").rename(r / "dog"), draw(r / "val" / "0.png", (1, 1, 1))],
        "val has no class folders",
    ),
    "a class without pictures": (
        "classes",
        lambda r: (r / "gnu").mkdir(),
        "class 'gnu' in .* has no picture",
    ),
    "names that differ in case": (
        "classes",
        lambda r: draw_classes(r, ["ANT"]),
        "classes 'ANT' and 'ant' in .* differ in nothing but their case",
    ),
    "names that differ in form": (
        "classes",
        lambda r: draw_classes(r, [unicodedata.normalize(f, "é") for f in ("NFC", "NFD")]),
        "differ in nothing but their Unicode form",
    ),
    "a table without a column": (
        "csv",
        lambda r: (r / "val.csv").write_text("file,label\nx,dog\n"),
        "has the columns file, label, but no filename",
    ),
    "a table that is missing": (
        "csv",
        lambda r: (r / "val.csv").unlink(),
        "val.csv is missing",
    ),
    "a short line": (
        "csv",
        lambda r: (r / "val.csv").write_text("filename,label\ndog00000000.png\n"),
        "val.csv: line 2 is too short",
    ),
    "a path that leads out": (
        "labels",
        lambda r: (r / "labels.csv").write_text("filename,label\n../../etc/x.png,ant\n"),
        "names '../../etc/x.png', which is not below",
    ),
    "a picture twice": (
        "labels",
        lambda r: (r / "labels.csv").write_text("filename,label\n" + "ant_0.png,ant\n" * 2),
        "class 'ant' in .* has a picture twice: .*ant_0.png",
    ),
    "no text": (
        "labels",
        lambda r: (r / "labels.csv").write_bytes(b"filename,label\n\xff\xfe,x\n"),
        "labels.csv is damaged",
    ),
    "a category in two groups": (
        "meta_album",
        lambda r: (r / "labels.csv").write_text(
            "FILE_NAME,CATEGORY,SUPER_CATEGORY\nant_0.png,ant,a\nant_1.png,ant,b\n"
        ),
        "category 'ant' is in 'a' and in 'b'",
    ),
    "no JSON": ("easy_set", lambda r: (r / "val.json").write_text("{"), "val.json is damaged"),
    "JSON without a list": (
        "easy_set",
        lambda r: (r / "val.json").write_text('{"class_names": ["dog"]}'),
        "has no list 'class_roots'",
    ),
    "lists that do not fit": (
        "easy_set",
        lambda r: (r / "val.json").write_text('{"class_names": ["dog"], "class_roots": []}'),
        "has 1 names of classes, but 0 folders",
    ),
    "a label that is no number of a name": (
        "closer_look",
        lambda r: (r / "val.json").write_text(
            json.dumps({"label_names": ["x"], "image_names": [str(r)], "image_labels": [7]})
        ),
        "label 7 is no number of its 1 names",
    ),
    "as many images as labels": (
        "closer_look",
        lambda r: (r / "val.json").write_text(
            json.dumps({"label_names": ["x"], "image_names": [], "image_labels": [0]})
        ),
        "has 0 images, but 1 labels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_one_clear_message(fault: str, tmp_path: Path) -> None:
    layout, change, message = FAULTS[fault]
    root = made(layout, tmp_path / "data")
    change(root)
    with pytest.raises(DataError, match=message):
        list_pictures(root)


def test_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        list_pictures(tmp_path / "nowhere")
    draw(tmp_path / "empty" / "loose.png", (1, 2, 3))
    with pytest.raises(DataError) as caught:
        list_pictures(tmp_path / "empty")
    for words in ("It has: loose.png", *(layout.what for layout in LAYOUTS.values())):
        assert words in str(caught.value)
    root = made("classes", tmp_path / "two")
    (root / "labels.csv").write_text("filename,label\nant/0.png,ant\n")
    with pytest.raises(ConfigError, match=r"data\.layout=classes.*data\.layout=labels"):
        list_pictures(root)
    assert list_pictures(root, "labels").sizes == (1,)
    assert len(list_pictures(root, "classes").pictures) == 18


def test_a_split_names_classes_that_are_there(tmp_path: Path) -> None:
    classes = {name: [Picture(f"{name}.png")] for name in "abc"}
    parts = {"train": ["a"], "val": ["b"], "test": ["c", "d"]}
    with pytest.raises(DataError, match=r"the test split has class 'd', of which .* has nothing"):
        listed(tmp_path, "as a list", classes, parts)
    with pytest.raises(DataError, match=r"the val split of .* has no classes"):
        listed(tmp_path, "as a list", classes, {"train": ["a"], "val": [], "test": ["c"]})
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    found = listed(
        tmp_path, "as a list", {**classes, forms[0]: [Picture("e.png")]},
        {"train": ["a", forms[1]], "val": ["b"], "test": ["c"]},
    )  # fmt: skip
    assert found.splits == {"train": [0, 3], "val": [1], "test": [2]}
