"""Which classes are taken for which, counted by hand and by scikit-learn."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix as by_sklearn

from metarun.config.trained import EvalConfig
from metarun.episodes.source import ImageEpisodes
from metarun.errors import ConfigError
from metarun.inference.confusion import (
    Confusion,
    as_table,
    count_confusion,
    lines,
    plain,
)
from metarun.inference.confusion_matrix import confusion_matrix
from metarun.inference.outcomes import drawn_source_of, each_task
from metarun.inference.trained import load
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, draw, write_run


def test_counts_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """Classes are found by their pictures, which are looked for in the whole store."""
    write_run(tmp_path, *GLYPHS, "algo=protonet", "task.within=group")
    trained = load(tmp_path, with_data=True)
    source = trained.setup.source
    store = source.stores["test"]  # type: ignore[attr-defined]
    everything = (store.images.double() / 255).flatten(1)
    place = {tuple(row.tolist()): i for i, row in enumerate(everything)}
    owner = torch.searchsorted(store.starts, torch.arange(len(everything)), right=True) - 1

    def class_of(x: torch.Tensor) -> int:
        return int(owner[place[tuple(x.flatten().tolist())]])

    true, taken, met = [], [], torch.zeros(len(store.class_names), len(store.class_names))
    for index in range(12):
        support_x, support_y, query_x, query_y = (p[0] for p in source.sample("test", index, 1))
        names = [class_of(support_x[support_y == label][0]) for label in range(3)]
        labels = trained.adapt(support_x, support_y, 3)(query_x).argmax(1)
        for x, y, label in zip(query_x, query_y, labels, strict=True):
            assert class_of(x) == names[int(y)]
            true.append(names[int(y)])
            taken.append(names[int(label)])
            met[true[-1], names] += 1
    assert isinstance(source, ImageEpisodes)
    found = count_confusion(source, "test", each_task(trained, source, "test", 12))
    right = by_sklearn(true, taken, labels=range(len(store.class_names)))
    assert np.array_equal(found.counts.numpy(), right)
    assert torch.equal(found.met.float(), met)
    assert 0 < np.trace(right) < right.sum(), "all is right, or all is wrong"


def test_an_evaluation_says_what_it_confuses(metarun: Metarun, tmp_path: Path) -> None:
    write_run(tmp_path / "run", *GLYPHS, "algo=maml", "inner_opt.lr=1")
    asked = ("episodes=10", "confusion=true", "hydra.run.dir=found")
    told = metarun("eval", "ckpt=run", *asked).stdout
    test = json.loads((tmp_path / "found/result.json").read_text())["test"]
    own = test["confusion"]
    right = sum(c["queries"] * c["accuracy"] for c in own["classes"].values())
    queries = sum(c["queries"] for c in own["classes"].values())
    assert queries == 10 * 3 * 2 and right / queries == pytest.approx(test["accuracy"])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found/confusion.csv").read_text())))
    assert sum(int(row["queries"]) for row in rows) == queries
    assert sum(int(r["queries"]) for r in rows if r["class"] == r["taken_for"]) == round(right)
    first = own["pairs"][0]
    assert f"{first['class']} for {first['taken_for']} ({first['queries']} of {first['of']}" in told
    with Image.open(tmp_path / "found/confusion.png") as picture:
        assert min(picture.size) > 300


def test_a_folder_of_few_classes_is_evaluated_on_all_of_them(
    metarun: Metarun, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", *GLYPHS, "algo=protonet")
    for number in range(16):
        draw(tmp_path / f"own/{'abcd'[number % 4]}/{number}.png", (28, 28), number)
    asked = (
        "data=folder", "data.root=own", "data.fit=true", "task.way=4", "episodes=6",
        "confusion=true", "hydra.run.dir=found",
    )  # fmt: skip
    refused = metarun("eval", "ckpt=run", *asked, code=2).stderr
    assert "data.fractions=[0,0,1]" in refused
    metarun("eval", "ckpt=run", *asked, "data.fractions=[0,0,1]")
    own = json.loads((tmp_path / "found/result.json").read_text())["test"]["confusion"]
    assert {name: c["queries"] for name, c in own["classes"].items()} == dict.fromkeys("abcd", 12)


def counted(names: int, queries: int = 10) -> Confusion:
    counts = torch.eye(names, dtype=torch.int64) * (queries - 1) + 1
    return Confusion(tuple(f"group/class{n}" for n in range(names)), counts, counts + queries)


def test_the_most_frequent_pairs_come_first() -> None:
    found = counted(3)
    found.counts[2, 0] = 5
    assert found.pairs()[0] == (2, 0) and len(found.pairs()) == 6
    assert lines(plain(found), 7)[1].startswith(
        "taken for another: group/class2 for group/class0 (5 of 11 queries)"
    )
    never = Confusion(("a", "=b"), torch.tensor([[4, 0], [0, 0]]), torch.tensor([[4, 0], [0, 0]]))
    right = {"queries": 4, "accuracy": 1.0, "mistake": None}
    assert plain(never) == {"classes": {"a": right}, "pairs": []}
    assert lines(plain(never), 1)[1] == "taken for another: none"
    assert as_table(never).splitlines() == ["class,taken_for,queries,of", "a,a,4,4"]


def test_of_many_classes_those_are_drawn_that_are_wrong_most_often() -> None:
    found = counted(200)
    found.counts[150] += 3
    axes = confusion_matrix(found).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert len(names) == 60 and "group/class150" in names


def test_no_line_goes_through_the_numbers_of_the_matrix() -> None:
    axes = confusion_matrix(counted(3)).axes[0]
    grid = [*axes.get_xgridlines(), *axes.get_ygridlines()]
    assert len(axes.texts) == 9 and not any(line.get_visible() for line in grid)


def test_control_characters_of_names_are_spelled_out() -> None:
    found = counted(2)._replace(names=("a\nb", "\x1b[31mred"))
    told = "\n".join(lines(plain(found), 3))
    assert "a\\nb for \\x1b[31mred" in told and "\x1b" not in told
    names = [text.get_text() for text in confusion_matrix(found).axes[0].get_yticklabels()]
    assert names == ["a\\nb", "\\x1b[31mred"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data=sinusoid", "algo=maml", "backbone=mlp"), "is for data of labelled images"),
        ((*GLYPHS, "algo=protonet", "task.min_way=2"), "is for tasks of one shape"),
    ],
)
def test_what_has_no_classes_is_refused(
    tmp_path: Path, settings: tuple[str, ...], words: str
) -> None:
    write_run(tmp_path, *settings)
    with pytest.raises(ConfigError, match=f"confusion=true {words}"):
        drawn_source_of(load(tmp_path, with_data=True).setup, "confusion=true")


def test_several_checkpoints_are_refused() -> None:
    with pytest.raises(ConfigError, match="confusion=true is for one checkpoint"):
        EvalConfig("run", ensemble=2, confusion=True)
