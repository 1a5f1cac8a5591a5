"""`task.within=group` from the command line: in training and in evaluation, apart or together."""

import json
from pathlib import Path

from tests.cli.test_domains import SHAPE, TINY
from tests.conftest import Metarun


def test_tasks_within_groups_in_training_and_in_evaluation(
    metarun: Metarun, tmp_path: Path
) -> None:
    small = ("data=glyphs", *SHAPE, *TINY)
    done = metarun("train", *small, "task.within=group", "task.train.within=all")
    assert "3-way 1-shot within a group, 2 queries a class" in done.stdout
    assert "trained on 3-way 1-shot of all classes" in done.stdout
    metarun("train", *small, "hydra.run.dir=run")
    done = metarun("eval", "ckpt=run", "task.within=group", "hydra.run.dir=inner")
    assert "within a group" in done.stdout
    metarun("eval", "ckpt=run", "hydra.run.dir=all")
    inner, mixed = (
        json.loads((tmp_path / f / "result.json").read_text()) for f in ("inner", "all")
    )
    assert inner["changed"] == {"task.within": "group"} and inner["test"]["within"] == "group"
    assert "within" not in mixed["test"]
    assert inner["test"]["accuracy_per_task"] != mixed["test"]["accuracy_per_task"]


def test_what_has_no_groups_is_refused(metarun: Metarun) -> None:
    done = metarun("train", "data=sinusoid", *TINY, "task.within=group", code=2)
    assert "task.within=group: data=sinusoid has no classes in groups" in done.stderr
    small = ("data=glyphs", *TINY, "task.within=group", "algo=protonet")
    done = metarun("train", *small, "task.way=26", code=2)
    assert "no group of the train split has task.way=26 classes" in done.stderr
    done = metarun("train", *small, "task.train.way=26", code=2)
    assert "no group of the train split has task.train.way=26 classes" in done.stderr
