"""A run on a folder of pictures: its splits, its settings, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from metarun.components.data.folder import FolderConfig, load
from metarun.components.data.split_by_class import SplitConfig, split_by_class
from metarun.config.trained import SensitivityConfig
from metarun.errors import ConfigError, MetarunError
from metarun.inference.sensitivity import Evaluated, measure
from metarun.training.inert import without_effect
from tests.components.test_omniglot import check_partition
from tests.conftest import Metarun
from tests.inference.runs import write_run
from tests.pictures.drawing import colour, draw_classes, draw_noise
from tests.setups import SMALL, setup_of

NAMES = [f"class{number:02}" for number in range(20)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_classes(tmp_path / "data", NAMES)


def test_each_split_has_its_own_classes(root: Path) -> None:
    stores = load(FolderConfig(root=str(root), size=4))
    parts = {split: list(store.class_names) for split, store in stores.items()}
    check_partition(parts, NAMES)
    assert [len(own) for own in parts.values()] == [13, 3, 4]
    for store in stores.values():
        for name, start, size in zip(store.class_names, store.starts, store.sizes, strict=True):
            own = [colour(NAMES.index(name), number) for number in range(3)]
            assert store.images[start : start + size, :, 2, 2].tolist() == [list(c) for c in own]


def test_the_split_is_one_of_the_seed_and_the_names_alone() -> None:
    names = [f"class {n}" for n in range(100)]
    parts = split_by_class(names, SplitConfig())
    assert [len(own) for own in parts.values()] == [64, 16, 20]
    assert parts["val"][:5] == PINNED, "a seed's split is part of a published result"
    backwards = split_by_class(names[::-1], SplitConfig())
    for split, own in parts.items():
        assert sorted(99 - c for c in backwards[split]) == own
    assert split_by_class(names, SplitConfig(split_seed=1)) != parts
    third = SplitConfig(fractions=[0.4, 0.3, 0.3])
    assert [len(own) for own in split_by_class(names, third).values()] == [40, 30, 30]
    for count in (3, 4, 5):
        assert all(split_by_class(names[:count], SplitConfig()).values())


PINNED = [1, 4, 9, 14, 16]


@pytest.mark.parametrize("parts", [[0.5, 0.5], [0.5, 0.5, 0.0], [0.6, 0.3, 0.3], [1, 0, 0]])
def test_fractions_that_are_none(parts: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.fractions=.*three numbers above 0"):
        SplitConfig(fractions=parts)


def test_too_little_is_refused(tmp_path: Path, root: Path) -> None:
    small = ("data=folder", f"data.root={root}", "data.size=28", "backbone.width=3", *SMALL)
    for settings, message in (
        (
            ("task.way=3", "task.shot=2"),
            "more than the 3 images of class .*: lower task.query, or leave the class out",
        ),
        (("task.way=3", "task.shot=3", "task.query=1"), ": lower task.shot, or leave the class"),
        (
            ("task.way=4", "task.query=1"),
            "task.way=4 is more than the 3 classes of the val split: lower task.way, or give that "
            r"split more classes \(by data.fractions",
        ),
    ):
        with pytest.raises(MetarunError, match=message):
            setup_of(*small, *settings)
    with pytest.raises(ConfigError, match="2 classes and no split"):
        load(FolderConfig(root=str(draw_classes(tmp_path / "two", ["a", "b"])), size=4))
    with pytest.raises(ConfigError, match=r"not given: data\.root="):
        load(FolderConfig())


def test_an_episode_is_of_the_folder(root: Path) -> None:
    settings = ("task.way=3", "task.query=2", "data.color=grey", "data.size=5", "backbone=mlp")
    setup = setup_of("data=folder", f"data.root={root}", *settings, *SMALL)
    task = setup.source.sample("val", 0, 4)
    assert task.support_x.shape == (4, 3, 1, 5, 5) and task.query_x.shape == (4, 6, 1, 5, 5)
    names = [name for name in NAMES if name in setup.source.stores["val"].class_names]
    greys = torch.tensor(
        [[_grey(NAMES.index(name), number) for number in range(3)] for name in names]
    )
    for label in range(3):
        seen = torch.cat([task.support_x[0, label][None], task.query_x[0, 2 * label :][:2]])
        values = (seen[:, 0, 0, 0] * 255).round().sort().values
        assert any(torch.equal(values, own.double().sort().values) for own in greys)


def _grey(kind: int, number: int) -> int:
    found = Image.new("RGB", (1, 1), colour(kind, number)).convert("L").getpixel((0, 0))
    assert isinstance(found, int)
    return found


def test_a_run_goes_on_where_the_folder_has_moved(
    metarun: Metarun, root: Path, tmp_path: Path
) -> None:
    tiny = (
        "train", "data=folder", "data.size=4", "backbone=mlp", "backbone.hidden=[4]", "task.way=3",
        "task.query=2", "trainer.steps=2", "trainer.meta_batch=2", "trainer.test_episodes=3",
        "trainer.eval_episodes=3", "engine.compile=none", "hydra.run.dir=run",
    )  # fmt: skip
    metarun(*tiny, "data.root=data", METARUN_DATA="nowhere")
    root.rename(tmp_path / "moved")
    assert "nothing to do" in metarun(*tiny, "data.root=moved").stderr
    said = metarun("eval", "ckpt=run", "data.root=moved", METARUN_DATA="nowhere").stdout
    assert "test accuracy" in said and "other data" not in said
    # METARUN_DATA is the folder of all data sets, not that of these pictures.
    assert "data: there is no such folder" in metarun("eval", "ckpt=run", code=1).stderr


def draw_splits(root: Path, seed: int = 0) -> Path:
    """Split folders of four classes each."""
    for place, split in enumerate(("train", "val", "test")):
        draw_noise(root / split, [f"{split}{n}" for n in range(4)], seed=seed + place)
    return root


def test_settings_of_a_split_by_class_change_nothing_where_folders_say_it(
    tmp_path: Path, root: Path
) -> None:
    def told(folder: Path, *settings: str) -> list[str]:
        small = ("data.size=28", "backbone.width=3", "task.way=2", "task.query=1", *SMALL)
        setup = setup_of("data=folder", f"data.root={folder}", *small, *settings)
        return without_effect(setup.config, "classification", 2, setup.source)

    given = ("data.split_seed=3", "data.fractions=[0.4,0.3,0.3]")
    by_folders = told(draw_splits(tmp_path / "splits"), *given)
    assert [text.partition("=")[0] for text in by_folders] == ["data.split_seed", "data.fractions"]
    assert all("the data say themselves" in text for text in by_folders)
    assert told(tmp_path / "splits") == told(root, *given) == []


def test_all_classes_are_test_classes_in_any_layout(tmp_path: Path) -> None:
    splits = draw_splits(tmp_path / "splits")
    stores = load(FolderConfig(root=str(splits), size=4, fractions=[0, 0, 1]))
    assert list(stores) == ["test"] and len(stores["test"].class_names) == 12


def test_a_run_on_a_folder_is_measured_on_all_classes_of_another(
    metarun: Metarun, tmp_path: Path
) -> None:
    draw_splits(tmp_path / "splits")
    draw_splits(tmp_path / "own", seed=3)
    tiny = ("data.size=4", "backbone=mlp", "backbone.hidden=[4]", "task.way=3", "task.query=2")
    write_run(tmp_path / "run", "data=folder", f"data.root={tmp_path}/splits", *tiny,
              "algo=protonet", *SMALL)  # fmt: skip

    def asked(folder: str, *settings: str) -> tuple[dict[str, Any], str]:
        out = f"hydra.run.dir={folder}"
        done = metarun("eval", "ckpt=run", "episodes=3", *settings, out)
        found: dict[str, Any] = json.loads((tmp_path / folder / "result.json").read_text())
        return found, done.stderr

    every = ("data=folder", "data.fractions=[0,0,1]", "task.way=12", "task.query=1")
    found, _ = asked("other", *every, "data.root=own")
    assert found["test"]["way"] == 12 and found["test"]["other_data"] is True
    assert "seen_in_training" not in found["test"]
    found, said = asked("same", *every)
    assert found["test"]["seen_in_training"] == {"trained_on": 4, "validated_on": 4, "of": 12}
    assert "4 of 12 test classes were trained on and 4 validated on" in said
    done = metarun("eval", "ckpt=run", *every, "split=val", code=2)
    assert "split=val: data=folder has only a test split" in done.stderr

    found, said = asked("seed", "data.split_seed=3")
    assert found["changed"] == {} and "other_data" not in found["test"]
    assert "otherwise than in training" not in said
    assert "without effect: data.split_seed=3 (the data say themselves" in said


def test_the_split_that_is_evaluated_has_to_be_large_enough_and_no_other(
    metarun: Metarun, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    for place, (split, classes, count) in enumerate(
        (("train", 3, 3), ("val", 3, 3), ("test", 6, 8))
    ):
        draw_classes(root / split, [f"{split}{n}" for n in range(classes)], count, first=3 * place)
    tiny = ("data.size=4", "backbone=mlp", "backbone.hidden=[4]", "task.way=3", "task.query=2")
    write_run(tmp_path / "run", "data=folder", f"data.root={root}", *tiny, "algo=protonet", *SMALL)
    asked = ("eval", "ckpt=run", "episodes=3")
    metarun(*asked, "task.way=6", "task.query=7", "hydra.run.dir=large")
    test = json.loads((tmp_path / "large" / "result.json").read_text())["test"]
    assert (test["way"], test["query"]) == (6, 7) and "other_data" not in test
    for change, words in {
        "task.way=7": "task.way=7 is more than the 6 classes of the test split",
        "task.query=8": "is more than the 8 images of class 'test0' in the test split",
        "split=val task.way=4": "task.way=4 is more than the 3 classes of the val split",
    }.items():
        assert words in metarun(*asked, *change.split(), code=2).stderr
    # An algorithm whose head has a row for each class of training, and other protocols.
    write_run(tmp_path / "head", "data=folder", f"data.root={root}", *tiny, "algo=baseline", *SMALL)
    metarun("eval", "ckpt=head", "episodes=3", "task.way=6", "hydra.run.dir=head_on_six")
    config = SensitivityConfig(str(tmp_path / "run"), episodes=3, norms=[], queries=[6], fewer=[])
    rows = list(measure(Evaluated(config)))
    assert [row.changes for row in rows][:2] == [{}, {"task.query": 6}] and not rows[1].reason
