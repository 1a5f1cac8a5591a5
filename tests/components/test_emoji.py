"""Emoji: found, drawn, split; classes and near-twins stay where they belong."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch

from metarun.components.data import emoji
from metarun.components.data._emoji_packages import SETS, drawings, find
from metarun.components.data.emoji import EmojiConfig, arranged, concepts, load
from metarun.errors import ConfigError, DataError
from tests.conftest import REPO

LIST = REPO / "metarun/components/data/lists/emoji.txt"
DIGEST = "b941884153a76815c6787ecdb37260284040740ce11f81ad17a2338075194c5a"
SIDE = 8
SHADES = {name: 16 * (number + 1) for number, name in enumerate(SETS)}
"""What each set paints, as a level of grey."""


def icons(names: list[str], shade: int) -> dict[str, object]:
    body = f'<path fill="#{shade:02x}{shade:02x}{shade:02x}" d="M0 0h4v4h-4z"/>'
    return {"prefix": "x", "width": 4, "height": 4, "icons": {n: {"body": body} for n in names}}


def pack(folder: Path, name: str, content: object, version: str = "1.2.3") -> Path:
    """A package as `npm pack` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iconify-json-{name}-{version}.tgz"
    text = json.dumps(content).encode()
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(text)
        archive.addfile(info, BytesIO(text))
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packages in which each set draws every concept as a square of its own shade."""
    root = tmp_path_factory.mktemp("data")
    for name, shade in SHADES.items():
        lacking = 3 if name == "fxemoji" else 0
        names = [concept.name for concept in concepts()][lacking:]
        pack(root / "emoji", name, icons(names, shade))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METARUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield root


def test_the_list_is_the_published_one() -> None:
    assert hashlib.sha256(LIST.read_bytes()).hexdigest() == DIGEST
    assert DIGEST in (REPO / "docs/emoji.md").read_text()
    assert len({concept.name for concept in concepts()}) == len(concepts()) == 938


@pytest.mark.parametrize(
    ("split", "counts"),
    [("class", (600, 150, 188)), ("group", (616, 175, 147)), ("artist", (600, 150, 188))],
)
def test_no_concept_is_in_two_parts(drawn: Path, split: str, counts: tuple[int, int, int]) -> None:
    stores = load(drawn, size=SIDE, split=split)
    parts = [set(store.class_names) for store in stores.values()]
    assert tuple(map(len, parts)) == counts
    assert len(set.union(*parts)) == 938
    if split == "group":
        by_part = [{name.split("/")[0] for name in part} for part in parts]
        assert sum(map(len, by_part)) == len(set.union(*by_part))
        assert by_part[2] == {"Food & Drink", "Activities"}


def shades(store: emoji.ClassStore, index: int) -> set[str]:
    """The sets whose drawings a class has, told by their shades."""
    start, size = int(store.starts[index]), int(store.sizes[index])
    images = store.images[start : start + size]
    assert all(len(image.unique()) == 1 for image in images)
    of_shade = {shade: name for name, shade in SHADES.items()}
    found = [of_shade[int(image[0, 0, 0])] for image in images]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("twins", ["one_per_house", "keep"])
@pytest.mark.parametrize("split", ["class", "artist"])
def test_each_class_has_the_drawings_that_were_asked_for(
    drawn: Path, split: str, twins: str
) -> None:
    missing = {concept.name for concept in concepts()[:3]}
    for part, store in load(drawn, size=SIDE, split=split, twins=twins).items():
        for index, name in enumerate(store.class_names):
            wanted = set(SETS)
            if name.split("/")[1] in missing:
                wanted -= {"fxemoji"}
            if twins == "one_per_house":
                wanted -= {"noto-v1", "emojione-v1", "fluent-emoji-flat"}
            if split == "artist":
                tested = {"noto", "noto-v1", "twemoji", "emojione", "emojione-v1"}
                wanted &= tested if part == "test" else set(SETS) - tested
            assert shades(store, index) == wanted


def test_a_twin_stands_in_where_the_first_of_a_house_is_missing() -> None:
    there = arranged([name for name in SETS if name != "noto"])
    first = emoji.first_of_houses(there)
    assert first["Google"] == "noto-v1"
    assert there.index("noto-v1") > there.index("emojione-v1")  # with the firsts, not the twins


def test_drawings_are_on_white_and_in_colour(tmp_path: Path) -> None:
    body = '<path fill="#f00" d="M0 0h2v4h-2z"/>'
    content = {"icons": {"half": {"body": body, "width": 4, "height": 4}}, "width": 9, "height": 9}
    svg = drawings(pack(tmp_path, "noto", content))["half"]
    by_set = {name: tmp_path for name in SETS}
    one = (emoji.Concept("Symbols", "half", "train", "train"),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "concepts", lambda: one)
        patch.setattr(emoji, "drawings", lambda package: {"half": svg})
        image = emoji.render(by_set, SIDE).images[0]
    assert image[:, 4, 1].tolist() == [255, 0, 0] and image[:, 4, 6].tolist() == [255, 255, 255]


def test_names_of_one_drawing_and_newer_packages(tmp_path: Path) -> None:
    content = icons(["cat"], 7) | {
        "aliases": {"kitty": {"parent": "cat"}, "turned": {"parent": "cat", "rotate": 1}}
    }
    found = drawings(pack(tmp_path, "noto", content))
    assert found.keys() == {"cat", "kitty"} and found["cat"] == found["kitty"]
    for name in SETS:
        pack(tmp_path, name, content, "1.9.0")
        pack(tmp_path, name, content, "1.10.0")
    assert all(path.name.endswith("-1.10.0.tgz") for path in find(tmp_path).values())
    unpacked = tmp_path / "node_modules/@iconify-json"
    for name in SETS:
        (unpacked / name).mkdir(parents=True)
        (unpacked / name / "icons.json").write_text(json.dumps(content))
    for path in tmp_path.glob("*.tgz"):
        path.unlink()
    assert drawings(find(tmp_path)["noto"]).keys() == {"cat", "kitty"}


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no emoji in .*npm pack @iconify-json/noto"):
        find(tmp_path)
    pack(tmp_path, "noto", icons(["cat"], 7))
    with pytest.raises(DataError, match=r"has 1 of the 9 sets .* npm pack @iconify-json/noto-v1"):
        find(tmp_path)
    for broken in (
        [],
        {"icons": []},
        {"icons": {"cat": {}}},
        {"icons": {"cat": {"body": "<image"}}},
    ):
        with pytest.raises(DataError, match=r"noto-1\.2\.3\.tgz"):
            drawings(pack(tmp_path, "noto", broken))
    path = pack(tmp_path, "noto", icons(["cat"], 7))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"noto-1\.2\.3\.tgz: cannot read"):
        drawings(path)
    for name in SETS:
        pack(tmp_path / "all", name, icons(["cat"], 7))
    with pytest.raises(DataError, match="which five houses should: take newer packages"):
        load(tmp_path / "all", size=SIDE)
    with pytest.raises(ConfigError, match=r"data\.size=4: must be from 8 to 1024"):
        EmojiConfig(size=4)


def test_the_view_of_a_part_has_an_identity_of_its_own(drawn: Path) -> None:
    found = {
        load(drawn, size=SIDE, split=split, twins=twins)[part].identity
        for split in ("class", "group", "artist")
        for twins in ("one_per_house", "keep")
        for part in ("train", "val", "test")
    }
    assert len(found) == 18
    again = load(drawn, size=SIDE)["test"]
    assert again.identity == load(drawn, size=SIDE)["test"].identity
    assert again.images.dtype is torch.uint8
