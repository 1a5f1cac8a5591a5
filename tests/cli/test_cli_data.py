"""`metarun data`: what it lists, prepares and finds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.episodes.inspection import counts
from metarun.episodes.store import ClassStore
from tests.conftest import Metarun
from tests.pictures.drawing import draw_classes

CLASSES = [f"class{number}" for number in range(12)]


@pytest.fixture
def own_cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_list_says_what_is_there_and_how_to_get_the_rest(metarun: Metarun, tmp_path: Path) -> None:
    said = metarun("data", "list", METARUN_DATA=str(tmp_path)).stdout
    assert f"missing: The Omniglot images are not in {tmp_path}" in said
    assert "data.download=true" in said
    for name, state in (
        ("glyphs", "needs no files"),
        ("sinusoid", "needs no files"),
        ("folder", "not given: data.root="),
        ("features", "not given: data.root="),
    ):
        own = f"\n{said}".partition(f"\n{name}: ")[2]
        assert own.splitlines()[1].strip().startswith(state)
    there = metarun("data", "list", f"data.root={tmp_path / 'there'}").stdout
    assert f"are not in {tmp_path / 'there'}" in there


def test_prepare_then_check(metarun: Metarun, tmp_path: Path, own_cache: str) -> None:
    draw_classes(tmp_path / "mine", CLASSES, count=4)
    settings = ("folder", "data.root=mine", "data.size=8")
    done = metarun("data", "prepare", *settings, METARUN_CACHE=own_cache).stdout
    assert "train: 8 classes, 32 examples, 4 of each" in done
    assert f"data=folder is ready, in {own_cache}/folder-" in done
    found = metarun(
        "data", "check", *settings, "task.way=2", "task.shot=2", "task.query=2", "sheet=s.png",
        METARUN_CACHE=own_cache,
    ).stdout  # fmt: skip
    assert "each example: 3×8×8 numbers" in found
    assert found.count(": 0\n") == 5 and "drawn in s.png" in found
    with Image.open(tmp_path / "s.png") as sheet:
        shown = np.asarray(sheet)
    assert len({tuple(c) for c in shown.reshape(-1, 3).tolist()}) >= 2 * 4 + 1, "examples and white"


def test_what_is_in_two_splits_is_found(metarun: Metarun, tmp_path: Path, own_cache: str) -> None:
    for number, (split, names) in enumerate(
        {"train": CLASSES[:4], "val": CLASSES[4:8], "test": CLASSES[8:]}.items()
    ):
        draw_classes(tmp_path / "mine" / split, names, first=4 * number)
    train, test = tmp_path / "mine" / "train", tmp_path / "mine" / "test"
    (test / "class9" / "1.png").write_bytes((train / "class0" / "2.png").read_bytes())
    (train / "class1" / "0.png").write_bytes((train / "class0" / "1.png").read_bytes())
    (train / "class2" / "\x1b[2J.png").write_bytes((train / "class2" / "1.png").read_bytes())
    done = metarun(
        "data", "check", "folder", "data.root=mine", "data.size=8", "task.way=2", "task.query=1",
        code=1, METARUN_CACHE=own_cache,
    )  # fmt: skip
    assert "in two splits is tested after it was trained on" in done.stderr
    for text in (
        "from 3 (class class0) to 4 (class class2) of each, 3 in the middle",
        "examples in two splits: 1\n  train: train/class0/2.png = test: test/class9/1.png",
        "examples in two classes of a split: 1\n  train: train/class0/1.png = train: ",
        "examples twice in their class: 1\n  train: train/class2/\\x1b[2J.png = train: ",
    ):
        assert text in done.stdout
    assert (tmp_path / "outputs" / "data" / "folder.png").exists()


def test_names_of_classes_are_spelled_out() -> None:
    images, starts, sizes = torch.zeros(3, 1, 1, 1), torch.tensor([0, 1]), torch.tensor([1, 2])
    told = counts(ClassStore(images, starts, sizes, ("a\nb", "\x1b[31m"), "drawn"))
    assert "from 1 (class a\\nb) to 2 (class \\x1b[31m) of each" in told


def test_check_of_data_without_pictures(metarun: Metarun, tmp_path: Path) -> None:
    assert "nothing to check" in metarun("data", "check", "sinusoid").stdout
    labels = np.repeat(np.arange(20), 20)
    np.savez(tmp_path / "f.npz", features=np.random.default_rng(0).normal(size=(400, 6)),
             labels=labels)  # fmt: skip
    settings = ("features", "data.root=f.npz", "task.way=3")
    assert "each example: 6 numbers" in metarun("data", "check", *settings).stdout
    assert not (tmp_path / "outputs").exists()


def test_a_plugins_data_are_checked_too(metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    found = metarun("data", "check", "spots", "+plugins=[mine]", "task.query=2").stdout
    assert "test: 6 classes, 24 examples, 4 of each" in found
    assert "spots: Spots." in metarun("data", "list", "+plugins=[mine]").stdout


PLUGIN = '''
from dataclasses import dataclass
import torch
from metarun.components import register
from metarun.components.data.images import image_episodes
from metarun.episodes.store import from_equal_classes

@dataclass
class SpotsConfig:
    """Spots."""
    name: str = "spots"

def load():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 6, 4, 1, 8, 8), dtype=torch.uint8, generator=generator)
    splits = zip(("train", "val", "test"), images, strict=True)
    return {s: from_equal_classes(i, [f"{s}{c}" for c in range(6)]) for s, i in splits}

register("data", "spots", SpotsConfig, image_episodes(load))
'''


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "choose one of list, check, prepare; usage"),
        ("lst", "not 'lst' (did you mean list?)"),
        ("check", "not given: the data set"),
        ("check data=glyphs", "not given: the data set"),
        ("check glyfs", "did you mean glyphs?"),
        ("check folder", "not given: data.root=<folder of pictures>"),
        ("check glyphs data.sed=1", "did you mean data.seed?"),
        ("check glyphs fast", "'fast' is no setting"),
        ("check glyphs task.way=500", "task.way=500 is more than"),
        ("check glyphs sheet=task.txt", "must end in .png"),
        ("list seed=1", "list takes data.root="),
    ],
)
def test_what_is_typed_wrongly_is_told(arguments: str, message: str, metarun: Metarun) -> None:
    assert message in metarun("data", *arguments.split(), code=2).stderr


def test_help(metarun: Metarun) -> None:
    assert "usage: metarun data list" in metarun("data", "--help").stdout
    assert "  data " in metarun("--help").stdout
