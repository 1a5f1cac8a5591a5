"""`data=multi` from the command line: trained on several data sets, evaluated on each."""

import json
from pathlib import Path

import pytest

from metarun.components.data.lake import has_seen
from metarun.components.data.multi import MultiConfig, names_of
from metarun.config.component import finder_of
from metarun.errors import ConfigError
from tests.cli.test_domains import SHAPE, TINY, draw_folder
from tests.conftest import Metarun


def test_a_run_on_two_data_sets(metarun: Metarun, tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures")
    own = f"{{name: folder, root: {pictures}, size: 28, color: rgb, weight: 2}}"
    sources = f"data.sources=[{{name: glyphs}},{own}]"
    small = ("data=multi", sources, *SHAPE, *TINY, "hydra.run.dir=run")
    done = metarun("train", *small, code=2)
    assert "the examples of glyphs are 1×28×28, those of folder 3×28×28" in done.stderr
    assert "data.shape=[1,28,28], which brings all images to that shape" in done.stderr
    looked = metarun(
        "data", "check", "multi", sources, "data.shape=[1,28,28]", "task.way=2", "task.query=1"
    )
    assert looked.stdout.count("each example: 1×28×28 numbers") == 2
    assert "glyphs:\ntrain: " in looked.stdout and "folder:\ntrain: " in looked.stdout
    assert (tmp_path / "outputs" / "data" / "multi.png").exists()
    done = metarun("train", *small, "data.shape=[1,28,28]")
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    each = test["per_source"]
    assert list(each) == ["glyphs", "folder"]
    assert each["glyphs"]["episodes"] == each["folder"]["episodes"] == 3
    mean = (each["glyphs"]["accuracy"] + each["folder"]["accuracy"]) / 2
    assert test["accuracy"] == pytest.approx(mean)
    assert each["folder"]["accuracy"] == pytest.approx(sum(test["accuracy_per_task"][1::2]) / 3)
    assert "accuracy on each: glyphs " in done.stdout
    done = metarun("eval", "ckpt=run", "hydra.run.dir=again")
    assert "accuracy on each: glyphs " in done.stdout
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["test"]["per_source"] == each and again["changed"] == {}
    alone = metarun("eval", "ckpt=run", "data=glyphs", "hydra.run.dir=alone")
    assert "data glyphs: one of several in training (multi)" in alone.stdout
    of_one = json.loads((tmp_path / "alone" / "result.json").read_text())["test"]
    assert of_one["training_sources"] == ["folder", "glyphs"]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"name": "glyphs"}], "must be two data sets or more"),
        ([{"name": "glyphs"}, {"weight": 2}], r"data\.sources\[1\] has no name; expected e\.g\."),
        ([{"name": "glyphs"}, {"name": "glyhps"}], "no data set 'glyhps'.*did you mean glyphs"),
        ([{"name": "glyphs"}, {"name": "multi"}], "no data set 'multi'"),
        ([{"name": "glyphs"}, {"name": "glyphs", "weight": 0}], "must be a number above 0"),
        ([{"name": "glyphs"}, {"name": "glyphs", "weight": "two"}], "must be a number above 0"),
        (
            [{"name": "glyphs"}, {"name": "glyphs", "sede": 1}],
            r"sources\[1\] has no setting 'sede'",
        ),
        ([{"name": "glyphs"}, {"name": "glyphs", "seed": "x"}], r"sources\[1\]\.seed='x': must be"),
    ],
)
def test_wrong_sources_are_refused(sources: list[dict[str, object]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MultiConfig(sources=sources)


def test_a_source_that_occurs_again_has_a_number() -> None:
    own = MultiConfig(sources=[{"name": "glyphs"}, {"name": "omniglot"}, {"name": "glyphs"}])
    assert names_of(own) == ["glyphs", "omniglot", "glyphs 2"]


def test_the_files_of_each_source_are_looked_for(tmp_path: Path) -> None:
    find = finder_of(MultiConfig)
    assert find is not None
    pictures = str(draw_folder(tmp_path / "pictures"))
    told = find(MultiConfig(sources=[{"name": "glyphs"}, {"name": "folder", "root": pictures}]))
    assert told.startswith("glyphs: needs no files; folder: 48 pictures of 12 classes")


def test_several_sources_may_have_seen_lakes_alphabets() -> None:
    mixed, split = {"name": "omniglot"}, {"name": "omniglot", "split": "background"}
    assert has_seen(MultiConfig(sources=[{"name": "glyphs"}, mixed]))
    assert not has_seen(MultiConfig(sources=[{"name": "glyphs"}, split]))
