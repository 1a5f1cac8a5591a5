"""`metarun explain`: a task as a picture, with the figures of its evaluation."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from metarun.episodes.source import ImageEpisodes
from metarun.inference import explain, explain_sheet
from metarun.inference.trained import load
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, save, write_run, write_task
from tests.setups import task_of


def test_it_has_the_predictions_of_each_inner_step(metarun: Metarun, tmp_path: Path) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=maml", "algo.eval_inner_steps=3")
    trained = load(tmp_path / "run", with_data=True)
    names = explain.names_of_run(trained, "test", 2)
    found = explain.explain(trained, explain.task_of_run(trained, "test", 2), names)
    trace = setup.algorithm.trace(trained.meta, task_of(setup, 2, "test"))
    assert torch.equal(found.losses, trace.query_loss) and len(found.losses) == 4
    assert torch.equal(found.scores, trace.query_score)
    task = task_of(setup, 2, "test")
    scores = trained.adapt(task.support_x, task.support_y, 3)(task.query_x)
    torch.testing.assert_close(found.probabilities[-1], scores.softmax(1))
    done = metarun("explain", "ckpt=run", "episode=2", "out=task.png")
    assert f"loss {float(found.losses[-1]):.4f}, after 3 inner steps" in done.stdout
    with Image.open(tmp_path / "task.png") as drawn:
        assert drawn.tobytes() == explain_sheet.sheet_of(found, trained).tobytes()
        colors = drawn.getcolors(2**20)
    assert colors is not None and any(r > g or g > r for _, (r, g, b) in colors)


def test_classes_of_a_task_are_named_and_what_is_not_drawn_is_told(
    metarun: Metarun, tmp_path: Path
) -> None:
    shape = ("task.shot=11", "task.query=4")
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=protonet", *shape, "backbone.norm=support")
    source: Any = setup.source
    names = source.stores["test"].class_names
    own = [names[number] for number in source.classes("test", 3, 1)[0]]
    told = metarun("explain", "ckpt=run", "episode=3").stdout
    assert f"A {own[0]}, B {own[1]}, C {own[2]}\n" in told
    assert (
        "drawn: 9 of 12 queries (3 of a class at most), 30 of 33 examples (10 of a class at most)"
    ) in told
    told = metarun("explain", "ckpt=run", "episode=3", "split=val").stdout
    assert f"A {own[0]}," not in told and "A alphabet" in told


def test_a_task_whose_classes_nobody_tells_has_no_names(tmp_path: Path) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=protonet")
    source: Any = copy(setup.source)
    trained = load(tmp_path / "run", with_data=True)
    assert len(explain.names_of_run(trained, "test", 0)) == 3
    source.__class__ = type("Fixed", (ImageEpisodes,), {"sample": lambda *given: None})
    other = replace(trained, setup=replace(trained.setup, source=source))
    assert explain.names_of_run(other, "test", 0) == ()


def test_control_characters_of_names_are_spelled_out(metarun: Metarun, tmp_path: Path) -> None:
    """Of classes and of files: they come from somebody else, and would break a line of a sheet."""
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=protonet", "backbone.norm=support")
    task = task_of(setup, 2, "test")
    write_task(tmp_path, task)
    (tmp_path / "support/class1").rename(tmp_path / "support/new\nline \x1b[31mred")
    (tmp_path / "query/class0-0.png").rename(tmp_path / "query/a\n0.png")
    (tmp_path / "query/\x1b[2J.png").write_bytes(b"no picture")
    (tmp_path / "support/new\nline \x1b[31mred/\x1b[2J.txt").write_bytes(b"no picture")
    own = ("ckpt=run", "support=support", "query=query", "data.skip_unreadable=true")
    for command in (("explain", *own), ("predict", *own, "sheet=sheet.png")):
        done = metarun(*command)
        assert "new\\nline \\x1b[31mred" in done.stdout and "left out query/\\x1b" in done.stderr
        assert "\x1b" not in done.stdout + done.stderr
    assert "new\nline" in (tmp_path / "predictions.csv").read_text()


def judged_and_open(path: Path) -> tuple[bool, bool]:
    """Whether a sheet of grey pictures has cells in green or red, and whether in blue."""
    with Image.open(path) as drawn:
        colors = [color for _, color in drawn.getcolors(2**20) or []]
    return any(b < max(r, g) for r, g, b in colors), any(b > max(r, g) for r, g, b in colors)


def test_a_task_of_own_pictures_is_drawn(metarun: Metarun, tmp_path: Path) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=maml", "algo.eval_inner_steps=2")
    task = task_of(setup, 2, "test")
    write_task(tmp_path, task)
    trace = setup.algorithm.trace(load(tmp_path / "run").meta, task)
    own = ("explain", "ckpt=run", "support=support", "query=query")
    done = metarun(*own, "out=unknown.png").stdout
    assert "A class0, B class1, C class2" in done and "no query lies in a folder" in done
    for number, (x, y) in enumerate(zip(task.query_x, task.query_y, strict=True)):
        save(tmp_path / "named" / f"class{y}" / f"{number}.png", x)
    done = metarun(*own[:3], "query=named", "out=known.png").stdout
    assert f"loss {float(trace.query_loss[-1]):.4f}, after 2 inner steps" in done
    assert "a prediction depends on the other queries" in done
    for path in (tmp_path / "query").glob("class[12]*"):
        path.unlink()
    mixed = metarun(*own[:3], "query=[named/class1,query]", "out=mixed.png").stdout
    assert "(of 2 of known class)" in mixed
    drawn = {name: judged_and_open(tmp_path / f"{name}.png") for name in ("unknown", "known")}
    assert drawn == {"unknown": (False, True), "known": (True, False)}
    assert judged_and_open(tmp_path / "mixed.png") == (True, True)


@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_padding_is_no_query_and_unknown_queries_count(tmp_path: Path, algo: str) -> None:
    """Of a run whose tasks are uneven: both have the label -1, and nothing else in common."""
    shape = ("task.way=4", "task.min_way=2", "task.shot=3", "task.min_shot=1")
    setup = write_run(tmp_path / "run", *GLYPHS, f"algo={algo}", *shape)
    trained = load(tmp_path / "run", with_data=True)
    tasks = [task_of(setup, number, "test") for number in range(8)]
    number = next(n for n, task in enumerate(tasks) if (task.query_y < 0).any())
    found = explain.explain(trained, explain.task_of_run(trained, "test", number))
    assert found.known.all() and len(found.known) == int((tasks[number].query_y >= 0).sum())
    assert len(found.task.support_x) == int((tasks[number].support_y >= 0).sum())
    trace = setup.algorithm.trace(trained.meta, tasks[number])
    torch.testing.assert_close(found.losses, trace.query_loss.double())
    assert torch.equal(found.scores, trace.query_score.double())
    x = torch.rand(3, *found.task.query_x.shape[1:])  # strangers share the batch's moments
    task = found.task._replace(
        query_x=torch.cat([found.task.query_x, x]),
        query_y=torch.cat([found.task.query_y, torch.full((3,), explain.UNKNOWN)]),
    )
    scores = trained.adapt(task.support_x, task.support_y, 4)(task.query_x)
    there = explain.explain(trained, task).probabilities[-1]
    torch.testing.assert_close(there, scores.softmax(1), check_dtype=False)
    assert (there[-3:] > 0).sum(1).eq(found.task.support_y.unique().numel()).all()


@pytest.mark.parametrize(("steps", "drawn"), [(0, [0]), (3, [0, 1, 2, 3]), (50, 8)])
def test_a_long_inner_loop_is_drawn_in_part(steps: int, drawn: object) -> None:
    found = explain_sheet.steps_to_draw(steps)
    assert found[0] == 0 and found[-1] == steps
    assert drawn in (found, len(found))


def test_what_has_no_pictures_is_refused(metarun: Metarun, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]")
    refused = metarun("explain", "ckpt=run", code=2)
    assert "explain draws tasks of pictures, which data=sinusoid does not have" in refused.stderr
    assert "out=a.jpg: must end in .png" in metarun("explain", "ckpt=x", "out=a.jpg", code=2).stderr
    own = ("support=a", "query=b")
    for given, told in {
        ("support=a",): "support goes with query=…",
        ("query=b",): "query goes with support=…",
        (*own, "episode=3"): "episode=3: it is for tasks of the run",
        (*own, "data.root=x"): "data.root: it is for tasks of the run",
        ("data.skip_unreadable=true",): "data.skip_unreadable: it is for support=… and query=…",
        ("support=a", "query=[]"): "query= is empty",
    }.items():
        assert told in metarun("explain", "ckpt=x", *given, code=2).stderr
