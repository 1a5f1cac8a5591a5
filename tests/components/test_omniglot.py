"""Omniglot: the layouts on disk, their faults, the cache, the download and the splits."""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import urllib.error
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from metarun.components.data import omniglot
from metarun.components.data._omniglot_files import download_missing, find
from metarun.components.data.splits import (
    OMNIGLOT_EVALUATION,
    omniglot_background,
    omniglot_names,
    omniglot_random,
    omniglot_vinyals,
)
from metarun.episodes.store import from_equal_classes, packed
from metarun.errors import DataError

PARTS = {
    "images_background": ("Greek/character01", "Greek/character02", "Latin/character01"),
    "images_evaluation": ("Keble/character01",),
}
NAMES = sorted(PARTS["images_background"] + PARTS["images_evaluation"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(path, left, top, mode="1"):
    """A drawing of 105x105 pixels: a black 21x42 bar on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, (105, 105), 1 if mode == "1" else 255)
    image.paste(0, (left, top, left + 21, top + 42))
    image.save(path)


def extract(folder, part):
    """Write the characters of a part as folders; every drawing differs."""
    for name in PARTS[part]:
        row = NAMES.index(name)
        for person in range(20):
            draw(folder / name / f"{row:04d}_{person + 1:02d}.png", 3 * person, 10 * row)
    return folder


def pack(folder, archive):
    """Zip `folder` with its own name as the first component, as the published zips do."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder.parent))
        file.writestr(f"__MACOSX/{folder.name}/Greek/character01/._0000_01.png", b"junk")


def make(layout, root):
    """Write the drawings below `root` in a layout; gives the folder to load from."""
    home = root if layout in ("flat", "omniglot") else root / "omniglot-py"
    if layout in ("flat", "omniglot"):
        home = root / "omniglot"
        for part in PARTS:
            extract(home, part)
        return home if layout == "flat" else root
    for part in PARTS:
        extract(home / part, part)
    zipped = {"zips": list(PARTS), "mixed": ["images_evaluation"]}.get(layout, [])
    for part in zipped:
        pack(home / part, home / f"{part}.zip")
        shutil.rmtree(home / part)
    return home if layout == "itself" else root


def characters(root, download=False):
    """The store of the fixture's characters."""
    return omniglot.characters(root, download=download, expected=NAMES)


def snapshot(root):
    """Everything below a folder with its time of change."""
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


@pytest.mark.parametrize("layout", ["folders", "zips", "mixed", "itself", "flat", "omniglot"])
def test_every_layout_gives_the_same_store(layout, tmp_path):
    reference = characters(make("folders", tmp_path / "reference"))
    root = make(layout, tmp_path / "data")
    before = snapshot(root)
    store = characters(root)
    assert store.class_names == tuple(NAMES)
    assert store.sizes.tolist() == [20] * 4
    assert torch.equal(store.images, reference.images)
    assert snapshot(root) == before


DEEPER = {
    "each in a folder of its name": lambda r: [
        (r / "omniglot-py" / part, r / "omniglot-py" / part / part) for part in PARTS
    ],
    "the whole folder once more": lambda r: [(r / "omniglot-py", r / "omniglot-py/omniglot-py")],
    "beside others": lambda r: [(r / "omniglot-py", r / "downloads")],
    "as the authors' repository": lambda r: [(r / "omniglot-py", r / "omniglot-master/python")],
}


@pytest.mark.parametrize("layout", ["folders", "zips"])
@pytest.mark.parametrize("deeper", DEEPER)
def test_what_is_unpacked_one_folder_too_deep_is_found(layout, deeper, tmp_path):
    reference = characters(make("folders", tmp_path / "reference"))
    root = make(layout, tmp_path / "data")
    for old, new in DEEPER[deeper](root):
        if layout == "zips" and old.name in PARTS:
            old = old.with_suffix(".zip")
            new = new.with_suffix(".zip")
        held = old.rename(tmp_path / "held")
        new.parent.mkdir(parents=True, exist_ok=True)
        held.rename(new)
    for alphabet in list(root.rglob("Greek")):
        (alphabet / "._character01").write_bytes(b"junk")
    (root / "__MACOSX" / "images_background" / "Greek" / "character01").mkdir(parents=True)
    assert torch.equal(characters(root).images, reference.images)


def test_all_alphabets_in_one_folder_too_deep_are_found_and_one_half_is_told(tmp_path):
    make("omniglot", tmp_path / "data")
    (tmp_path / "data" / "omniglot").rename(tmp_path / "held")
    (tmp_path / "data" / "omniglot").mkdir()
    (tmp_path / "held").rename(tmp_path / "data" / "omniglot" / "omniglot")
    assert characters(tmp_path / "data").class_names == tuple(NAMES)
    make("zips", tmp_path / "half")
    (tmp_path / "half" / "omniglot-py" / "images_evaluation.zip").unlink()
    with pytest.raises(DataError, match=r"Only one of the two parts is there: .*background\.zip"):
        characters(tmp_path / "half")


def test_images_are_small_and_ink_is_bright(tmp_path):
    images = characters(make("zips", tmp_path)).images
    assert images.shape == (80, 1, 28, 28) and images.dtype == torch.uint8
    first = images[0, 0]
    assert (first[:10, :5] > 240).all() and (first[16:] < 15).all() and (first[:, 10:] < 15).all()
    # Of 105x105 pixels, 21x42 are ink; the shape keeps its area.
    assert images.double().mean().item() / 255 == pytest.approx(21 * 42 / 105**2, rel=0.03)
    assert len({image.numpy().tobytes() for image in images}) == 80


def test_edges_are_smoothed_for_both_pixel_modes(tmp_path):
    small = {}
    for mode in ("1", "L"):
        draw(tmp_path / f"{mode}.png", 31, 31, mode)
        small[mode] = omniglot.shrink((tmp_path / f"{mode}.png").read_bytes())
    assert small["1"] == small["L"]
    assert set(small["1"]) - {0, 255}, "the nearest pixel was taken instead of a filter"


def test_drawings_keep_the_order_of_the_people(tmp_path):
    images = characters(make("mixed", tmp_path)).images.view(4, 20, 28, 28).double()
    columns = torch.arange(28, dtype=torch.float64)
    centres = (images.sum(2) * columns).sum(2) / images.sum((2, 3))
    assert (centres.diff(dim=1) > 0.5).all()


def test_second_load_reads_the_cache(tmp_path, cache, monkeypatch):
    root = make("zips", tmp_path)
    first = characters(root)
    monkeypatch.setattr(omniglot, "convert", None)
    second = characters(root)
    assert torch.equal(first.images, second.images) and first.class_names == second.class_names
    assert len(list(cache.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("layout", ["folders", "zips", "flat"])
def test_changed_source_is_converted_again(layout, tmp_path):
    root = make(layout, tmp_path / "data")
    first = characters(root)
    if layout == "zips":
        folder = extract(tmp_path / "images_evaluation", "images_evaluation")
        changed = folder / "Keble/character01/0002_01.png"
    else:
        changed = next(root.rglob("Keble/character01/0002_01.png"))
    draw(changed, 60, 60)  # in place: the folder's own time stays
    os.utime(changed, ns=(10**18, 10**18))
    if layout == "zips":
        pack(folder, root / "omniglot-py/images_evaluation.zip")
    second = characters(root)
    differ = (first.images != second.images).flatten(1).any(1)
    assert differ.sum() == 1 and differ[NAMES.index("Keble/character01") * 20]


def test_damaged_zip_is_named(tmp_path):
    root = make("zips", tmp_path)
    archive = root / "omniglot-py/images_background.zip"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"images_background\.zip is damaged.*delete .*download"):
        characters(root)
    start = whole.index(b"IDAT") + 8
    archive.write_bytes(whole[:start] + bytes(8) + whole[start + 8 :])
    with pytest.raises(DataError, match=r"images_background\.zip is damaged.*0000_01\.png.*CRC"):
        characters(root)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_damaged_png_is_named_and_not_cached(content, tmp_path, cache):
    root = make("folders", tmp_path)
    file = root / "omniglot-py/images_background/Greek/character02/0001_07.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:60] if content is None else content)
    with pytest.raises(DataError, match=r"0001_07\.png is damaged") as caught:
        characters(root)
    assert str(file) in str(caught.value)
    assert not list(cache.glob("*.safetensors"))
    file.write_bytes(whole)
    assert characters(root).class_names == tuple(NAMES)


def test_incomplete_data_are_refused(tmp_path, cache):
    root = make("folders", tmp_path)
    shutil.rmtree(root / "omniglot-py/images_background/Latin")
    (root / "omniglot-py/images_evaluation/Keble/character01/0002_03.png").unlink()
    draw(root / "omniglot-py/images_evaluation/Klingon/character01/0000_01.png", 0, 0)
    with pytest.raises(DataError) as caught:
        characters(root)
    message = str(caught.value)
    assert "Latin lacks 1 character" in message
    assert "Keble/character01 has 19 drawings" in message
    assert "Klingon/character01 is no character" in message
    assert not list(cache.glob("*.safetensors"))


def test_advice_never_is_to_delete_a_flat_folder(tmp_path):
    root = make("flat", tmp_path)
    (root / "Keble/character01/0002_03.png").unlink()
    with pytest.raises(DataError) as caught:
        characters(root)
    assert "or delete" not in str(caught.value)


def check_advice(message, root):
    """The message says where was looked, for what, and what to type."""
    for words in (
        str(root / "omniglot-py"),
        str(root / "omniglot") + "/<Alphabet>/characterNN/*.png",
        "images_{background,evaluation}/<Alphabet>/characterNN/*.png",
        "images_{background,evaluation}.zip",
        "data.root=",
        "METARUN_DATA",
        "data=glyphs",
    ):
        assert words in message


def test_missing_data_without_download(tmp_path, cache):
    with pytest.raises(DataError) as caught:
        omniglot.load(tmp_path / "nowhere", download=False)
    check_advice(str(caught.value), tmp_path / "nowhere")
    with pytest.raises(DataError) as caught:
        omniglot.load(None, download=False)
    check_advice(str(caught.value), cache / "data")
    assert not (tmp_path / "nowhere").exists()


def test_missing_half_is_told(tmp_path):
    root = make("zips", tmp_path)
    (root / "omniglot-py/images_background.zip").unlink()
    with pytest.raises(DataError, match=r"Only one of the two parts.*images_evaluation\.zip"):
        characters(root)


def fake_torchvision(monkeypatch, fetch):
    """Replace torchvision by one whose download calls `fetch(folder, part)`."""

    def construct(root, background, download):
        assert download and socket.getdefaulttimeout() is not None
        folder = Path(root) / "omniglot-py"
        folder.mkdir(parents=True, exist_ok=True)
        fetch(folder, "images_background" if background else "images_evaluation")

    datasets = SimpleNamespace(Omniglot=construct)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def fetch_whole(folder, part):
    """What a download leaves behind: the zip and the folder beside it."""
    extract(folder / part, part)
    pack(folder / part, folder / f"{part}.zip")


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), TimeoutError("timed out"), RuntimeError("md5")],
)
def test_failed_download_leaves_nothing_and_says_why(error, tmp_path, monkeypatch):
    def fetch(folder, part):
        (folder / f"{part}.zip").write_bytes(b"the first half")
        extract(folder / part, part)
        raise error

    fake_torchvision(monkeypatch, fetch)
    with pytest.raises(DataError) as caught:
        omniglot.load(tmp_path / "data", download=True)
    check_advice(str(caught.value), tmp_path / "data")
    assert f"The download failed: {error}" in str(caught.value)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert find(tmp_path / "data") == ()
    assert socket.getdefaulttimeout() is None


def test_a_failed_download_takes_back_its_folders_and_spoils_no_other(tmp_path, monkeypatch):
    """A root that is mistyped, as a part of one that is complete."""

    def fetch(folder, part):
        raise urllib.error.URLError("no route to host")

    fake_torchvision(monkeypatch, fetch)
    root = make("zips", tmp_path / "good")
    for wrong in (root / "omniglot-py" / "images_background", tmp_path / "no" / "such"):
        with pytest.raises(DataError, match="The download failed"):
            characters(wrong, download=True)
        assert not wrong.exists()
    assert not (tmp_path / "no").exists()
    (root / "omniglot-py" / "images_background").mkdir()  # as an earlier version left it
    assert len(characters(root).class_names) == len(NAMES)


def test_download_into_an_unwritable_place(tmp_path, monkeypatch):
    fake_torchvision(monkeypatch, fetch_whole)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="The download failed"):
        characters(tmp_path / "file", download=True)


def test_download_fetches_both_parts(tmp_path, monkeypatch):
    fake_torchvision(monkeypatch, fetch_whole)
    store = characters(tmp_path / "data", download=True)
    assert store.class_names == tuple(NAMES)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["omniglot-py"]
    files = sorted(path.name for path in (tmp_path / "data/omniglot-py").iterdir())
    assert files == sorted([*PARTS, *(f"{part}.zip" for part in PARTS)])


def test_second_part_that_fails_is_fetched_alone_next_time(tmp_path, monkeypatch):
    fetched = []

    def fetch(folder, part):
        fetched.append(part)
        if fetched == list(PARTS):
            raise urllib.error.URLError("gone")
        fetch_whole(folder, part)

    fake_torchvision(monkeypatch, fetch)
    with pytest.raises(DataError, match="Only one of the two parts"):
        characters(tmp_path, download=True)
    assert characters(tmp_path, download=True).class_names == tuple(NAMES)
    assert fetched == [*PARTS, "images_evaluation"]


def test_download_keeps_what_is_there(tmp_path, monkeypatch):
    root = make("zips", tmp_path)
    kept = root / "omniglot-py/images_background.zip"
    (root / "omniglot-py/images_evaluation.zip").unlink()
    before = kept.stat()
    fake_torchvision(monkeypatch, fetch_whole)
    download_missing(root / "omniglot-py")
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    assert characters(root / "omniglot-py").class_names == tuple(NAMES)


def check_partition(parts, names):
    """The three lists are sorted, disjoint and together everything."""
    assert list(parts) == ["train", "val", "test"]
    assert all(members == sorted(members) for members in parts.values())
    assert sorted(name for members in parts.values() for name in members) == sorted(names)


def test_names_are_those_of_the_published_set():
    names = omniglot_names()
    assert len(names) == len(set(names)) == 1623 and names == sorted(names)
    assert names[0] == "Alphabet_of_the_Magi/character01" and names[-1] == "ULOG/character26"
    assert len({name.split("/")[0] for name in names}) == 50


def test_random_split_is_pinned():
    names = omniglot_names()
    parts = omniglot_random(names, 0)
    check_partition(parts, names)
    assert [len(members) for members in parts.values()] == [1100, 100, 423]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    assert digest == "78d52747b9aac9926cc7e62c5f67cf71c156f277dcc1c2605ac654105b08bc4c"
    assert omniglot_random(reversed(names), 0) == parts, "the order of the names matters"
    assert omniglot_random(names, 1) != parts


def test_vinyals_split_goes_by_alphabet():
    names = omniglot_names()
    parts = omniglot_vinyals(names)
    check_partition(parts, names)
    assert [len(members) for members in parts.values()] == [1028, 172, 423]
    alphabets = {
        part: Counter(name.split("/")[0] for name in members) for part, members in parts.items()
    }
    assert {part: len(counts) for part, counts in alphabets.items()} == {
        "train": 33,
        "val": 5,
        "test": 13,
    }
    assert alphabets["train"].keys() & alphabets["test"].keys() == {"Gurmukhi"}
    assert [name for name in parts["test"] if name.startswith("Gurmukhi")] == [
        f"Gurmukhi/character{number}" for number in (42, 43, 44, 45)
    ]


def test_lakes_split_holds_back_whole_alphabets():
    names = omniglot_names()
    parts = omniglot_background(names, 0)
    check_partition(parts, names)
    alphabets = {part: {name.split("/")[0] for name in own} for part, own in parts.items()}
    assert {part: len(own) for part, own in alphabets.items()} == {
        "train": 25,
        "val": 5,
        "test": 20,
    }
    assert alphabets["test"] == set(OMNIGLOT_EVALUATION)
    assert len(parts["test"]) == 659 and len(parts["train"] + parts["val"]) == 964
    assert not alphabets["train"] & alphabets["val"], "no character of a validation alphabet trains"
    other = omniglot_background(names, 1)
    assert other["test"] == parts["test"] and other["val"] != parts["val"]
    assert omniglot_background(reversed(names), 0) == parts
    assert sorted(alphabets["val"]) == VALIDATION


VALIDATION = [
    "Burmese_(Myanmar)",
    "Futurama",
    "Inuktitut_(Canadian_Aboriginal_Syllabics)",
    "Ojibwe_(Canadian_Aboriginal_Syllabics)",
    "Syriac_(Estrangelo)",
]


def test_lakes_evaluation_set_is_that_of_the_files(real_data):
    with zipfile.ZipFile(real_data / "omniglot-py" / "images_evaluation.zip") as archive:
        found = {name.split("/")[1] for name in archive.namelist() if name.count("/") > 2}
    assert found == set(OMNIGLOT_EVALUATION)


@pytest.mark.parametrize("split", ["random", "vinyals", "background"])
@pytest.mark.parametrize("rotations", [False, True])
def test_load_hands_each_split_its_own_images(split, rotations, monkeypatch):
    names = omniglot_names()
    numbers = torch.arange(1623)
    images = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).view(1623, 1, 1, 1, 2)
    store = from_equal_classes(images, names)
    monkeypatch.setattr(omniglot, "characters", lambda root, download: store)
    if rotations:  # a turn needs squares
        store = from_equal_classes(images.expand(1623, 1, 1, 2, 2), names)
    stores = omniglot.load(None, download=False, split=split, rotations=rotations)
    seeded = {"random": omniglot_random, "background": omniglot_background}
    parts = seeded[split](names, 0) if split in seeded else omniglot_vinyals(names)
    for part, members in parts.items():
        count = len(members)
        assert len(stores[part].class_names) == count * (4 if rotations else 1)
        upright = ["/rot0/".join(name.split("/")) for name in members] if rotations else members
        assert list(stores[part].class_names[:count]) == upright
        pixels = packed(stores[part]).images[:count, 0, 0].long()
        found = [names[high * 256 + low] for high, low in pixels.tolist()]
        assert found == members


def test_unknown_split_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"'lake'.*random.*vinyals"):
        omniglot.load(tmp_path, download=False, split="lake")


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory):
    """One cache for all tests on the real images: they are converted once."""
    return tmp_path_factory.mktemp("omniglot-cache")


@pytest.fixture
def real(real_data, real_cache, monkeypatch):
    """The folder of the real images, with a cache for these tests."""
    monkeypatch.setenv("METARUN_CACHE", str(real_cache))
    return real_data


def test_real_images_are_complete(real):
    store = omniglot.characters(real, download=False)
    assert list(store.class_names) == omniglot_names()
    assert store.images.shape == (1623 * 20, 1, 28, 28)
    assert (store.sizes == 20).all()
    ink = store.images.flatten(1).double().mean(1) / 255
    assert 0.05 < ink.mean() < 0.15 and (ink > 0).all() and (ink < 0.5).all()


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("random", (1100, 100, 423)),
        ("vinyals", (1028, 172, 423)),
        ("background", (851, 113, 659)),
    ],
)
def test_real_splits_share_no_character(split, sizes, real):
    stores = omniglot.load(real, download=False, split=split)
    assert tuple(len(store.class_names) for store in stores.values()) == tuple(4 * n for n in sizes)
    drawn = {
        part: {re.sub(r"/rot\d+(?=/)", "", name) for name in store.class_names}
        for part, store in stores.items()
    }
    assert tuple(map(len, drawn.values())) == sizes
    assert len(set().union(*drawn.values())) == 1623
    upright = omniglot.load(real, download=False, split=split, rotations=False)
    for part, store in upright.items():
        images = packed(store).images
        count = len(images)
        assert torch.equal(images, stores[part].images[:count])
        turned = torch.rot90(images, 1, dims=(-2, -1))
        assert torch.equal(turned, stores[part].images[count : 2 * count])


def test_real_cache_gives_the_same_images(real, real_cache, monkeypatch):
    first = omniglot.characters(real, download=False)
    assert len(list(real_cache.glob("omniglot-v1-*.safetensors"))) == 1
    monkeypatch.setattr(omniglot, "convert", None)
    assert torch.equal(omniglot.characters(real, download=False).images, first.images)
