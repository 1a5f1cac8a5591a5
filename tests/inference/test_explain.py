"""`metarun explain`: a task as a picture, with the figures of its evaluation."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from metarun.inference import explain
from metarun.inference.trained import load
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, write_run
from tests.setups import task_of


def test_it_has_the_predictions_of_each_inner_step(metarun: Metarun, tmp_path: Path) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=maml", "algo.eval_inner_steps=3")
    trained = load(tmp_path / "run", with_data=True)
    found = explain.explain(trained, "test", 2)
    trace = setup.algorithm.trace(trained.meta, task_of(setup, 2, "test"))
    assert torch.equal(found.losses, trace.query_loss) and len(found.losses) == 4
    assert torch.equal(found.scores, trace.query_score)
    task = task_of(setup, 2, "test")
    scores = trained.adapt(task.support_x, task.support_y, 3)(task.query_x)
    torch.testing.assert_close(found.probabilities[-1], scores.softmax(1))
    done = metarun("explain", "ckpt=run", "episode=2", "out=task.png")
    assert f"loss {float(found.losses[-1]):.4f}, after 3 inner steps" in done.stdout
    with Image.open(tmp_path / "task.png") as drawn:
        assert drawn.tobytes() == explain.sheet_of(found, trained).tobytes()
        colors = drawn.getcolors(2**20)
    assert colors is not None and any(r > g or g > r for _, (r, g, b) in colors)


@pytest.mark.parametrize(("steps", "drawn"), [(0, [0]), (3, [0, 1, 2, 3]), (50, 8)])
def test_a_long_inner_loop_is_drawn_in_part(steps: int, drawn: object) -> None:
    found = explain.steps_to_draw(steps)
    assert found[0] == 0 and found[-1] == steps
    assert drawn in (found, len(found))


def test_what_has_no_pictures_is_refused(metarun: Metarun, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]")
    refused = metarun("explain", "ckpt=run", code=2)
    assert "explain draws tasks of pictures, which data=sinusoid does not have" in refused.stderr
    assert "out=a.jpg: must end in .png" in metarun("explain", "ckpt=x", "out=a.jpg", code=2).stderr
