"""Classes of a test that were trained on are told, whatever they are called."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from metarun.components.data.split_by_class import SplitConfig, split_by_class
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.several import SeveralSources
from metarun.episodes.shared import Seen, class_pictures, count_seen, digests, together
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes, split_stores, with_rotations
from metarun.training.result import line
from metarun.training.seen_classes import among_sources, shared_by_sources
from tests.conftest import Metarun
from tests.pictures.drawing import draw_noise

CPU = torch.device("cpu")
NAMES = [f"class{number}" for number in range(24)]


def images(classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (classes, 4, 1, 5, 5), generator=generator, dtype=torch.uint8)


def store(pixels: torch.Tensor, first: str = "c") -> ClassStore:
    return from_equal_classes(pixels, [f"{first}{i}" for i in range(len(pixels))])


def source(whole: ClassStore, train: list[int], val: list[int], test: list[int]) -> ImageEpisodes:
    stores = split_stores(whole, {"train": train, "val": val, "test": test})
    return ImageEpisodes(stores, way=2, shot=1, query=1, seed=0, device=CPU)


def seen(tested: Any, trained: Any, split: str = "test") -> Seen:
    known = [together(class_pictures(trained, part)) for part in ("train", "val")]
    return count_seen(class_pictures(tested, split), *known)


def test_a_class_is_known_by_any_of_its_pictures_and_not_by_its_name() -> None:
    pixels = images(8)
    one = source(store(pixels), [0, 1, 2], [3, 4], [5, 6, 7])
    changed = pixels.flip(1).clone()
    changed[:, :3] ^= 1  # one picture of each class is as before, at another place
    other = source(store(changed, "other"), [5, 6], [7, 0], [1, 2, 3, 4])
    assert seen(other, one) == Seen(2, 2, 4) and seen(one, other) == Seen(2, 1, 3)
    assert seen(other, one, "train") == Seen(0, 0, 2)
    assert seen(source(store(images(8, 1)), [0, 1], [2, 3], [4, 5]), one) == Seen(0, 0, 2)
    turned = source(with_rotations(store(pixels)), [4, 5], [6, 7], [0, 1, 8, 9])
    assert seen(turned, one) == Seen(2, 0, 4), "a turned class is another one"


def test_pictures_of_one_colour_make_no_classes_the_same() -> None:
    pixels, others = images(6), images(6, 1)
    pixels[:, 0], others[:, 0] = 255, 255
    splits = [0, 1], [2, 3], [4, 5]
    assert seen(source(store(others), *splits), source(store(pixels), *splits)) == Seen(0, 0, 2)
    red = torch.tensor([255, 0, 10], dtype=torch.uint8)[:, None, None]
    pixels, others = (own.repeat(1, 1, 3, 1, 1) for own in (images(6), images(6, 1)))
    pixels[:, 0], others[:, 0] = red, red
    assert seen(source(store(others), *splits), source(store(pixels), *splits)) == Seen(0, 0, 2)
    features, more = torch.randn(2, 6, 4, 7)
    features[:, 0], more[:, 0] = 0.0, 0.0  # of a network that gives nothing
    assert seen(source(store(more), *splits), source(store(features), *splits)) == Seen(0, 0, 2)


def test_features_are_compared_as_pictures_are() -> None:
    features = torch.randn(6, 4, 7)
    assert len(set(digests(features.flatten(0, 1)))) == 24
    one = source(store(features), [0, 1], [2, 3], [4, 5])
    other = source(store(features.clone()), [4, 5], [2, 3], [0, 1])
    assert seen(other, one) == Seen(2, 0, 2)


def test_what_one_model_has_learned_from_is_training() -> None:
    options: Any = {"label_noise": 0.0, "seed": 0, "device": CPU, "dtype": torch.float32}
    model = LabelledExamples(store(images(6)), classes=3, held_out=1, val=1, test=1, **options)
    tasks = source(store(images(6)), [0, 1], [2, 3], [4, 5])
    counts = [seen(tasks, model, split).trained_on for split in ("train", "val", "test")]
    assert sum(counts) == 3


def test_sources_are_told_what_they_have_of_each_other(caplog: pytest.LogCaptureFixture) -> None:
    whole = store(images(9))
    one = source(whole, [0, 1, 2], [3, 4], [5, 6, 7, 8])
    other = source(whole, [5, 6, 3], [7, 0], [1, 8, 2])
    both = SeveralSources({"one": one, "other": other}, [1, 1], 0)
    figures = among_sources(both, "test", ["val"])
    assert figures == {
        "seen_in_training": {"trained_on": 4, "validated_on": 1, "of": 7}, "shared_by_sources": 1,
    }  # fmt: skip
    assert caplog.messages == [
        "2 of 4 test classes of one are training classes of other: test figures are too good",
        "1 of 4 test classes of one are validation classes of other: test figures are too good",
        "1 of 2 validation classes of one are training classes of other: they choose a worse "
        "checkpoint as the best",
        "2 of 3 test classes of other are training classes of one: test figures are too good",
        "1 of 2 validation classes of other are training classes of one: they choose a worse "
        "checkpoint as the best",
        "one and other share 1 of 4 test classes: their tasks may be the same, which then count "
        "twice, and the interval is too narrow",
    ]
    caplog.clear()
    # Of data that were not trained on, tasks alone can be the same.
    assert shared_by_sources(both, "test") == {"shared_by_sources": 1}
    assert len(caplog.messages) == 1
    caplog.clear()
    apart = SeveralSources({"one": one, "new": source(store(images(9, 1)), [0, 1], [2, 3], [4, 5])},
                           [1, 1], 0)  # fmt: skip
    assert among_sources(apart, "test", ["val"]) == {} and among_sources(one, "test") == {}
    assert not caplog.messages


def test_a_source_is_told_what_it_has_in_two_splits(caplog: pytest.LogCaptureFixture) -> None:
    pixels = images(9)
    pixels[6, 2] = pixels[0, 1]  # of a test class and of a training class
    pixels[7, 0] = pixels[4, 3]  # of a test class and of a validation class
    pixels[3, 0] = pixels[1, 0]
    own = source(store(pixels), [0, 1, 2], [3, 4], [5, 6, 7, 8])
    assert among_sources(own, "test", ["val"]) == {} and not caplog.messages  # of no user
    figures = among_sources(own, "test", ["val"], "folder")
    assert figures == {"seen_in_training": {"trained_on": 1, "validated_on": 1, "of": 4}}
    where = "as well (metarun data check names the pictures)"
    assert caplog.messages == [
        f"1 of 4 test classes of folder are training classes {where}: test figures are too good",
        f"1 of 4 test classes of folder are validation classes {where}: test figures are too good",
        f"1 of 2 validation classes of folder are training classes {where}: they choose a worse "
        "checkpoint as the best",
    ]
    assert among_sources(own, "val", own="folder") == {
        "seen_in_training": {"trained_on": 1, "validated_on": 0, "of": 2}
    }
    other = source(store(images(9, 1)), [0, 1, 2], [3, 4], [5, 6, 7, 8])
    both = SeveralSources({"mine": own, "other": other}, [1, 1], 0)
    expected = {"trained_on": 1, "validated_on": 1, "of": 8}
    assert among_sources(both, "test") == {"seen_in_training": expected}


def test_pictures_in_two_splits_of_ones_own_folder_are_told(
    metarun: Metarun, tmp_path: Path
) -> None:
    pictures = draw_noise(tmp_path / "drawn", NAMES[:9])
    for number, folder in enumerate(sorted(pictures.iterdir())):
        split = ("train", "val", "test")[number // 3]
        (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
        folder.rename(tmp_path / "data" / split / folder.name)
    twice = (tmp_path / "data/train/class1/2.png").read_bytes()
    (tmp_path / "data/test/class7/9.png").write_bytes(twice)
    data = ("data=folder", f"data.root={tmp_path / 'data'}", "data.size=28", "data.color=grey")
    done = metarun("train", *data, *TINY, "hydra.run.dir=run")
    assert "1 of 3 test classes of folder are training classes as well" in done.stderr
    assert "1 of 3 test classes were trained on)" in done.stdout
    again = metarun("eval", "ckpt=run", "hydra.run.dir=again")
    assert "1 of 3 test classes were trained on)" in again.stdout
    for folder in ("run", "again"):
        test = json.loads((tmp_path / folder / "result.json").read_text())["test"]
        assert test["seen_in_training"] == {"trained_on": 1, "validated_on": 0, "of": 3}


def splits(seed: int) -> dict[str, set[int]]:
    own = SplitConfig(split_seed=seed, fractions=[0.5, 0.25, 0.25])
    return {split: set(found) for split, found in split_by_class(NAMES, own).items()}


def expected(tested: int, trained: int) -> dict[str, int]:
    then, now = splits(trained), splits(tested)["test"]
    known = [len(now & then[split]) for split in ("train", "val")]
    assert all(known), "the test asks for something"
    return {"trained_on": known[0], "validated_on": known[1], "of": len(now)}


TINY = (
    "backbone=mlp", "backbone.hidden=[8]", "trainer.steps=2", "trainer.meta_batch=2",
    "trainer.eval_episodes=2", "trainer.test_episodes=6", "task.way=3", "task.query=2",
)  # fmt: skip


def test_classes_of_training_do_not_come_into_a_test_unnoticed(
    metarun: Metarun, tmp_path: Path
) -> None:
    pictures = draw_noise(tmp_path / "pictures", NAMES)
    settings = {"size": "28", "color": "grey", "fractions": "[0.5,0.25,0.25]"}
    data = ("data=folder", f"data.root={pictures}", *(f"data.{k}={v}" for k, v in settings.items()))

    def figures(folder: str) -> dict[str, Any]:
        found = json.loads((tmp_path / folder / "result.json").read_text())
        test: dict[str, Any] = found["test"]
        return test

    def words(counts: dict[str, int]) -> str:
        return (
            f"{counts['trained_on']} of {counts['of']} test classes were trained on and "
            f"{counts['validated_on']} validated on"
        )

    metarun("train", *data, *TINY, "hydra.run.dir=run")
    assert "seen_in_training" not in figures("run")
    done = metarun("eval", "ckpt=run", "hydra.run.dir=same")
    assert "classes were" not in done.stderr and "seen_in_training" not in figures("same")

    # Another split of the run's own data.
    known = expected(tested=1, trained=0)
    done = metarun("eval", "ckpt=run", "data.split_seed=1", "hydra.run.dir=split")
    assert figures("split")["seen_in_training"] == known
    assert f"other data than in training, {words(known)})" in done.stdout
    assert f"{words(known)}, by the run: figures are too good" in done.stderr
    assert done.stderr.count("pictures of 24 classes") == 1, "they are looked at without a word"

    # Another data set that has the same pictures.
    more = ", ".join(f"{key}: {value}" for key, value in settings.items())
    again = f"{{name: folder, root: {pictures}, {more}, split_seed: 1}}"
    both = f"data.sources=[{again},{{name: glyphs}}]"
    done = metarun("eval", "ckpt=run", "data=multi", both, "hydra.run.dir=multi")
    counts = figures("multi")["seen_in_training"]
    assert counts.items() >= {k: known[k] for k in ("trained_on", "validated_on")}.items()
    assert counts["of"] > known["of"], "those of glyphs are among them"
    assert "data multi: other data than in training (folder)" in done.stdout
    assert words(counts) in done.stdout

    # The run that the weights are from.
    own = (*data, "data.split_seed=1", *TINY, "backbone.weights=run")
    done = metarun("train", *own, "hydra.run.dir=next")
    assert figures("next")["seen_by_weights"] == known
    assert f"{words(known)}, by the run of backbone.weights: figures are too good" in done.stderr
    assert f"{words(known)}, by the run of backbone.weights)" in done.stdout
    done = metarun("eval", "ckpt=next", "hydra.run.dir=next_again")
    assert figures("next_again")["seen_by_weights"] == known

    # Several sources, one of which is the other in another split.
    first = re.sub("split_seed: 1", "split_seed: 0", again)
    done = metarun(
        "train", "data=multi", f"data.sources=[{first},{again}]", *TINY, "hydra.run.dir=two"
    )
    part = f"{known['trained_on']} of {known['of']} test classes of folder 2 are training classes"
    assert f"{part} of folder: test figures are too good" in done.stderr
    looked = metarun(
        "data", "check", "multi", f"data.sources=[{first},{again}]", "task.query=1", code=1
    )
    assert f"{part} of folder: test figures are too good" in looked.stderr
    assert "data=multi: its data sets share classes" in looked.stderr
    other = expected(tested=0, trained=1)
    assert figures("two")["seen_in_training"] == {k: known[k] + other[k] for k in known}
    metarun("eval", "ckpt=two", "hydra.run.dir=two_again")
    assert figures("two_again")["seen_in_training"] == figures("two")["seen_in_training"]

    # Nobody can tell where pictures have another size, or the data are gone.
    asked = ("eval", "ckpt=run", "data=multi", "hydra.run.dir=fitted", "data.fit=true")
    done = metarun(*asked, both.replace("size: 28", "size: 14"), "data.shape=[1,14,14]")
    assert "pictures of another size or colour are never the same" in done.stderr
    assert "seen_in_training" not in figures("fitted")
    pictures.rename(tmp_path / "gone")
    done = metarun("eval", "ckpt=run", "data=glyphs", "hydra.run.dir=glyphs")
    assert "classes not compared with those of training: its data are not here" in done.stderr
    assert "data glyphs: another domain than in training (folder))" in done.stdout
    assert "seen_in_training" not in figures("glyphs")


def test_a_result_line_says_which_classes_were_seen() -> None:
    own = {
        "score": "accuracy", "accuracy": 0.5, "ci95": 0.1, "episodes": 3, "way": 2, "shot": 1,
        "query": 1, "inner_steps": None, "batch_norm": "none", "data": "lake",
        "training_data": "omniglot",
    }  # fmt: skip
    counts = {"trained_on": 0, "validated_on": 3, "of": 1200}
    assert line(own | {"seen_in_training": counts}, "val").endswith(
        "other data than in training (omniglot), 3 of 1,200 validation classes were validated on)"
    )
    # Of Lake's runs, where the data of training are not here.
    assert line(own | {"seen_in_training": True}, "test").endswith(
        "another domain than in training (omniglot on characters of these alphabets))"
    )
