"""`metarun sensitivity`: each row is an evaluation of its own, on the tasks of the first."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from metarun.config.trained import SensitivityConfig
from metarun.errors import ConfigError
from metarun.inference import sensitivity
from metarun.inference.sensitivity import Evaluated, Row, measure, protocols, to_do
from metarun.rundir.interval import half_width95
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, write_run

ASKED = ("queries=[1,2]", "inner_steps=[0,2]", "label_orders=2", "fewer=[3]", "episodes=8")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "sensitivity.json").read_text())["rows"]
    return found


def evaluated(metarun: Metarun, folder: Path, *settings: str) -> list[float]:
    metarun("eval", "ckpt=run", "episodes=8", f"hydra.run.dir={folder}", *settings)
    found: list[float] = json.loads((folder / "result.json").read_text())["test"][
        "accuracy_per_task"
    ]
    return found


def test_each_row_is_an_evaluation_of_its_own(metarun: Metarun, tmp_path: Path) -> None:
    own = ("algo=maml", "task.way=3", "task.query=3", "inner_opt.lr=1", "engine.compile=none")
    write_run(tmp_path / "run", *GLYPHS, *own)
    told = metarun("sensitivity", "ckpt=run", *ASKED).stdout
    rows = {tuple(row["changes"].items()): row for row in rows_of(tmp_path)}
    norms = [("backbone.norm", name) for name in ("support", "support_plus_one")]
    queries = [("task.query", 1), ("task.query", 2)]
    steps = [("algo.eval_inner_steps", 0), ("algo.eval_inner_steps", 2)]
    both = [(norm, query) for norm in norms for query in queries]
    alone = [(one,) for one in (*norms, *queries, *steps, ("label orders", 2))]
    assert list(rows) == [(), *alone, *both, (("tasks", 3),)]
    own = evaluated(metarun, tmp_path / "own")
    first = rows[()]
    assert first["score"] == fmean(own) and first["tasks"] == 8 and first["difference"] is None
    for changes in [(norms[0],), (queries[1],), (steps[0],), both[0]]:
        typed = [f"{key}={value}" for key, value in changes]
        scores = evaluated(metarun, tmp_path / "-".join(typed), *typed)
        apart = [there - here for there, here in zip(scores, own, strict=True)]
        row = rows[changes]
        assert row["score"] == pytest.approx(fmean(scores), abs=1e-12), changes
        assert row["paired"] and row["difference"] == pytest.approx(fmean(apart), abs=1e-12)
        assert row["difference_ci95"] == pytest.approx(half_width95(stdev(apart), 8))
    assert rows[(("tasks", 3),)]["score"] == pytest.approx(fmean(own[:3]))
    assert any(abs(row["difference"] or 0) > 0 for row in rows.values()), "nothing has an effect"
    assert "written to sensitivity.md and sensitivity.json" in told
    (tmp_path / "notes.md").write_text("by hand")
    error = metarun("sensitivity", "ckpt=run", "out=notes.md", code=2).stderr
    assert "notes.md was not written by metarun sensitivity" in error
    for words in ("as the run was tested", "2 orders of the classes", "the first 3 tasks alone"):
        assert words in told and words in (tmp_path / "sensitivity.md").read_text()


def found(folder: Path, *settings: str, **asked: Any) -> tuple[list[Row], Evaluated]:
    write_run(folder, *settings)
    run = Evaluated(SensitivityConfig(str(folder), episodes=4, **asked))
    seen: list[int] = []
    rows = list(measure(run, seen.append))
    assert seen == sorted(seen) and seen[-1] == to_do(run)
    return rows, run


def test_no_order_changes_a_method_that_treats_labels_alike(tmp_path: Path) -> None:
    rows, run = found(
        tmp_path, *GLYPHS, "algo=protonet", queries=[], norms=[], label_orders=3, fewer=[]
    )
    assert [row.changes for row in rows] == [{}, {"label orders": 3}]
    assert rows[1].difference == pytest.approx(0) and rows[1].spread == pytest.approx(0)
    assert sensitivity.protocols(run.base, run.config) == [{"label orders": 3}]


def test_what_is_impossible_says_why_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows, _ = found(tmp_path, *GLYPHS, "algo=protonet", norms=["support"], queries=[1000, 1])
    reasons = {tuple(row.changes.values()): row.reason for row in rows}
    assert "is more than the" in reasons[(1000,)] and "is more" in reasons["support", 1000]
    assert not reasons[(1,)] and not reasons["support", 1]
    assert math.isnan(next(row for row in rows if row.reason).score)


def test_a_regression_has_neither_classes_nor_their_moments(tmp_path: Path) -> None:
    rows, _ = found(
        tmp_path, "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]", "algo=maml",
        queries=[2], inner_steps=[2],
    )  # fmt: skip
    assert [row.changes for row in rows] == [
        {}, {"task.query": 2}, {"algo.eval_inner_steps": 2},
    ]  # fmt: skip
    assert rows[2].paired, "the curves are the same"


@pytest.mark.real_data
def test_rotated_classes_are_other_tasks(tmp_path: Path, real_data: Path) -> None:
    rows, _ = found(
        tmp_path, "data=omniglot", f"data.root={real_data}", "algo=protonet", "backbone=conv4",
        "backbone.width=3", queries=[], norms=[], label_orders=0,
    )  # fmt: skip
    own, other = rows
    assert other.changes == {"data.rotations": False} and not other.paired
    assert other.difference_ci95 == pytest.approx(math.hypot(own.ci95, other.ci95))


@pytest.mark.parametrize(
    ("settings", "asked", "words"),
    [
        (("algo=supervised", "data=glyphs_examples"), {}, "trains one model"),
        (GLYPHS, {"episodes": 1}, "episodes=1"),
        (GLYPHS, {"queries": [0]}, "queries=0"),
        (GLYPHS, {"norms": ["batch"]}, "norms: batch is none of transductive"),
        (GLYPHS, {"out": "table.html"}, "must end in .md"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, settings: tuple[str, ...], asked: dict[str, Any], words: str
) -> None:
    write_run(tmp_path, *settings)
    with pytest.raises(ConfigError, match=words):
        Evaluated(SensitivityConfig(str(tmp_path), **asked))


def test_uneven_tasks_have_no_other_order(tmp_path: Path) -> None:
    rows, run = found(
        tmp_path, *GLYPHS, "algo=protonet", "task.way=4", "task.min_way=2", queries=[1], norms=[]
    )
    assert [row.changes for row in rows] == [{}, {"task.query": 1}]
    assert protocols(run.base, run.config) == [{"task.query": 1}]
