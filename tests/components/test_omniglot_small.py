"""The two small background sets of Omniglot: their files say which alphabets they have."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from metarun.components.data import omniglot
from metarun.components.data._omniglot_small import find_small
from metarun.components.data.omniglot import OmniglotConfig
from metarun.components.data.splits import (
    OMNIGLOT_ALPHABETS,
    OMNIGLOT_EVALUATION,
    omniglot_names,
)
from metarun.episodes.store import from_equal_classes, packed
from metarun.errors import DataError

ALPHABETS = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")  # 136 characters
NAMES = [name for name in omniglot_names() if name.split("/")[0] in ALPHABETS]


def drawing(number: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("L", (4, 4), number.to_bytes(16, "big")).save(file, "PNG")
    return file.getvalue()


def write(home: Path, names: Sequence[str] = NAMES, drawings: int = 20) -> Path:
    """The zip of a small set; each drawing differs."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "images_background_small1.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number, name in enumerate(names):
            for person in range(drawings):
                inner = f"images_background_small1/{name}/{number:04}_{person + 1:02}.png"
                file.writestr(inner, drawing(1 + 20 * number + person))
    return path


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 1623 characters, white, in the place of the real ones."""
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    store = from_equal_classes(torch.zeros(1623, 20, 1, 28, 28).byte(), omniglot_names())
    monkeypatch.setattr(omniglot, "characters", lambda root, *, download: store)


@pytest.mark.usefixtures("whole")
def test_four_alphabets_train_one_validates_and_twenty_are_the_test(tmp_path: Path) -> None:
    write(tmp_path / "omniglot-py")
    stores = omniglot.load(tmp_path, split="background_small1", rotations=False)
    alphabets = {s: {n.split("/")[0] for n in one.class_names} for s, one in stores.items()}
    assert len(alphabets["train"]) == 4 and len(alphabets["val"]) == 1
    assert alphabets["train"] | alphabets["val"] == {*ALPHABETS}
    assert alphabets["test"] == {*OMNIGLOT_EVALUATION}
    of_val = next(iter(alphabets["val"]))
    sizes = [len(stores[split].class_names) for split in ("train", "val", "test")]
    assert sizes == [136 - OMNIGLOT_ALPHABETS[of_val], OMNIGLOT_ALPHABETS[of_val], 659]
    own = packed(stores["train"])
    for place in (0, 7, len(own.class_names) - 1):
        number = NAMES.index(own.class_names[place])
        wanted = omniglot.shrink(drawing(1 + 20 * number))
        assert own.images[20 * place].numpy().tobytes() == wanted, "drawings of the small set"
    others = [omniglot.load(tmp_path, split="background_small1", split_seed=s) for s in range(1, 6)]
    assert len({store["val"].class_names for store in others}) > 1
    assert all(len(store["train"].class_names) % 4 == 0 for store in others), "rotated"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("names", "drawings", "message"),
    [
        (NAMES[:-1], 20, "has 135 characters of 5 alphabets, not 136 of 5"),
        ([*NAMES[:-1], "Keble/character01"], 20, "has Keble, which is of the evaluation set"),
        ([*NAMES[:-1], "Klingon/character01"], 20, "Klingon/character01 is no character of"),
        (NAMES, 19, "has 19 drawings instead of 20"),
    ],
)
def test_a_set_that_is_not_what_it_should_be_is_refused(
    names: Sequence[str], drawings: int, message: str, tmp_path: Path
) -> None:
    write(tmp_path, names, drawings)
    with pytest.raises(DataError, match=message):
        omniglot.load(tmp_path, split="background_small1")


@pytest.mark.usefixtures("whole")
def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no images_background_small2\.zip.*brendenlake/omniglot"):
        omniglot.load(tmp_path, split="background_small2")
    clone = tmp_path / "omniglot" / "python"
    path = write(clone, NAMES[:1])
    assert find_small(tmp_path, "background_small1") == path
    unpacked = tmp_path / "omniglot-py" / "images_background_small1" / "Greek" / "character01"
    unpacked.mkdir(parents=True)
    assert find_small(tmp_path, "background_small1") == unpacked.parent.parent
    monkeypatch.setattr(omniglot, "find", lambda root: (root / "zips",))
    own = OmniglotConfig(root=str(tmp_path), split="background_small1")
    assert omniglot.found(own).startswith(f"{unpacked.parent.parent} and ")
