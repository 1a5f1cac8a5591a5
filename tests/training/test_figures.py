"""Every figure that a run shows equals what is computed by hand from the same tasks."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from metarun.cli import eval
from metarun.components.build import build_data
from metarun.components.data.images import image_episodes
from metarun.config.compose import composed
from metarun.config.run import TrainConfig
from metarun.episodes.store import ClassStore, from_equal_classes
from metarun.rundir import checkpoint
from metarun.training import run as train
from tests import by_hand
from tests.conftest import swap_builder
from tests.setups import config_of

CPU = torch.device("cpu")
COMMON = (
    "backbone=mlp", "engine.precision=float64", "device=cpu", "algo.inner_steps=2",
    "algo.eval_inner_steps=3", "trainer.steps=8", "trainer.log_every=3", "trainer.meta_batch=3",
    "trainer.eval_every=2", "trainer.eval_episodes=5", "trainer.test_episodes=7",
    "trainer.checkpoint_every=4",
)  # fmt: skip
SINES = (
    *COMMON, "data=sinusoid", "backbone.hidden=[6]", "task.shot=4", "task.query=5", "seed=3",
    "inner_opt.lr=0.02", "outer_opt.lr=0.02", "outer_opt.schedule=cosine", "outer_opt.min_lr=0.001",
)  # fmt: skip
IMAGES = (
    *COMMON, "data=glyphs", "backbone.hidden=[5,4]", "task.way=3", "task.shot=1", "task.query=4",
    "seed=1", "inner_opt.lr=0.5", "inner_opt.learn=[lr]", "inner_opt.granularity=step",
    "outer_opt.lr=0.05", "outer_opt.clip_norm=0.1",
)  # fmt: skip
RUNS = {
    "sines, loop": (*SINES, "engine.compile=none", "engine.batching=loop"),
    "sines, replayed": (*SINES, "engine.compile=replay"),
    "sines, chunks": (*SINES, "engine.compile=none", "engine.batching=vmap", "engine.chunk=2"),
    "images, vmap": (*IMAGES, "engine.compile=none", "engine.batching=vmap"),
    "images, replayed loop": (*IMAGES, "engine.compile=replay", "engine.batching=loop"),
}


def images(seed: int) -> dict[str, ClassStore]:
    """Classes that can be told apart, with noise, so that accuracies are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    stores = {}
    for split, classes in (("train", 12), ("val", 6), ("test", 7)):
        centre = torch.rand(classes, 1, 1, 3, 3, generator=generator)
        noise = torch.rand(classes, 8, 1, 3, 3, generator=generator)
        pixels = (255 * (centre + noise) / 2).to(torch.uint8)
        stores[split] = from_equal_classes(pixels, [f"{split}{c}" for c in range(classes)])
    return stores


@pytest.fixture(scope="module", autouse=True)
def small_images() -> Iterator[None]:
    """Small images in place of the drawn ones."""
    with pytest.MonkeyPatch.context() as patch:
        swap_builder(patch, "data", "glyphs", image_episodes(images))
        yield


class Done:
    """A run that has been made, what it has left, and the same by hand."""

    def __init__(self, directory: Path, overrides: tuple[str, ...]) -> None:
        self.directory = directory
        self.config: TrainConfig = config_of(*overrides)
        self.source = build_data(self.config, CPU)
        self.returned = train.run(self.config, directory)
        self.hand = by_hand.run(self.config, self.source)
        self.score = "mse" if self.source.kind == "regression" else "accuracy"
        text = (directory / "metrics.jsonl").read_text()
        self.logged: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        self.result: dict[str, Any] = json.loads((directory / "result.json").read_text())


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tmp_path_factory.mktemp("figures") / "run", request.param)


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_every_logged_figure_is_what_the_tasks_give(done: Done) -> None:
    """Training: the mean since the last line. Validation: after adaptation, on its own tasks."""
    logged = [
        {tag: value for tag, value in line.items() if not tag.startswith("time/")}
        for line in done.logged
    ]
    assert [line["step"] for line in logged] == [2, 3, 4, 6, 6, 8, 8]
    assert [sorted(line) for line in logged] == [sorted(line) for line in done.hand.logged]
    for line, expected in zip(logged, done.hand.logged, strict=True):
        assert line == close(expected)


def test_times_grow_and_speeds_count_tasks(done: Done) -> None:
    times = [line["time/elapsed_s"] for line in done.logged]
    assert times == sorted(times) and times[-1] <= done.result["train_seconds"] + 0.01
    speeds = [line["time/tasks_per_s"] for line in done.logged if "time/tasks_per_s" in line]
    assert len(speeds) == 3
    tasks = [3 * 3, 3 * 3, 2 * 3]
    assert (
        sum(count / speed for count, speed in zip(tasks, speeds, strict=True)) <= times[-1] + 0.01
    )


def expected_test(done: Done, scores: Tensor, losses: Tensor) -> dict[str, Any]:
    steps = range(scores.shape[1])
    return {
        done.score: float(scores[:, -1].mean()),
        "ci95": by_hand.half_width(scores[:, -1]),
        "episodes": len(scores),
        "inner_steps": len(steps) - 1,
        f"{done.score}_per_inner_step": [float(scores[:, i].mean()) for i in steps],
        "ci95_per_inner_step": [by_hand.half_width(scores[:, i]) for i in steps],
        "loss_per_inner_step": [float(losses[:, i].mean()) for i in steps],
        f"{done.score}_per_task": scores[:, -1].tolist(),
        "score": done.score,
        "algo": "maml",
        "data": done.config.data.name,
        "way": done.config.task.way,
        "shot": done.config.task.shot,
        "query": done.config.task.query,
        "seed": done.config.seed,
        "batch_norm": "none",
    }


def assert_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        assert found[key] == (value if isinstance(value, str) else close(value)), key


def test_the_result_is_that_of_the_best_model_on_the_test_tasks(done: Done) -> None:
    hand = done.hand
    assert_figures(done.result["test"], expected_test(done, hand.test, hand.test_losses))
    assert done.result["best"] == close(hand.best)
    assert (done.result["steps"], done.result["skipped_steps"]) == (8, 0)
    assert hand.best is not None and done.returned == close(hand.best["score"])


def test_the_best_validation_is_the_lowest_error_and_the_highest_accuracy(done: Done) -> None:
    scores = [line[f"val/{done.score}"] for line in done.logged if "val/loss" in line]
    best = min(scores) if done.score == "mse" else max(scores)
    assert done.result["best"]["score"] == best
    assert len(set(scores)) > 1, "there is something to choose from"


def test_the_last_checkpoint_holds_the_parameters_of_the_last_step(done: Done) -> None:
    meta = checkpoint.load(done.directory / "checkpoints" / "last.safetensors")["meta"]
    for value, expected in zip(meta.values(), done.hand.final, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_tensorboard_shows_the_log_and_the_result(done: Done) -> None:
    events = EventAccumulator(str(done.directory / "tb")).Reload()
    shown = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in done.logged:
        for tag, value in line.items():
            if tag not in ("step", "time/elapsed_s"):
                expected.setdefault(tag, []).append((line["step"], value))
    test, best, score = done.result["test"], done.result["best"], done.score
    for what in (score, "loss"):
        expected[f"test/{what}_by_inner_step"] = list(enumerate(test[f"{what}_per_inner_step"]))
    expected[f"test/{score}"] = [(8, test[score])]
    expected["test/loss"] = [(8, test["loss_per_inner_step"][-1])]
    expected[f"val/best_{score}"] = [(8, best["score"])]
    assert shown.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in shown[tag]] == [step for step, _ in points], tag
        values = [value for _, value in points]
        assert [value for _, value in shown[tag]] == pytest.approx(values, rel=1e-6), tag


def as_shown(score: str, value: float) -> str:
    return f"{100 * value:.2f} %" if score == "accuracy" else f"{value:.4f}"


def test_what_a_person_reads_are_the_same_figures(
    done: Done, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The run is finished: its command shows the stored figures again."""
    caplog.set_level(logging.INFO)
    assert train.run(done.config, done.directory) == done.returned
    out = capsys.readouterr().out
    hand, score = done.hand, done.score
    assert hand.best is not None
    value, ci95 = float(hand.test[:, -1].mean()), by_hand.half_width(hand.test[:, -1])
    own = f"test {score} {as_shown(score, value)} ± {as_shown(score, ci95)} (95 % CI; 7 tasks"
    assert own in out
    best = (as_shown(score, hand.best[key]) for key in ("score", "ci95"))
    assert f"best validation {score} {' ± '.join(best)}, at meta-step {hand.best['step']}" in out
    steps = [as_shown(score, float(column.mean())) for column in hand.test.T]
    assert f"{score} after 0, 1, … inner steps: {', '.join(steps)}" in out


def test_the_lines_of_a_log_are_the_same_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    done = Done(tmp_path / "run", RUNS["images, vmap"])
    lines = [record.getMessage() for record in caplog.records]
    for own in done.hand.logged:
        if "train/loss" in own:
            shown = f"loss {own['train/loss']:.4f}  accuracy {100 * own['train/accuracy']:.2f} %"
        else:
            shown = (
                f"val accuracy {100 * own['val/accuracy']:.2f} % ± {100 * own['val/ci95']:.2f} %"
            )
        assert any(re.match(rf"step {own['step']}/8  {re.escape(shown)}", line) for line in lines)


@pytest.fixture(scope="module")
def run_on_images(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tmp_path_factory.mktemp("evaluated") / "run", RUNS["images, vmap"])


@pytest.mark.parametrize(
    ("asked", "split", "episodes", "seed"),
    [
        ((), "test", 7, 1),
        (("split=val",), "val", 5, 1),
        (("split=train", "episodes=4"), "train", 4, 1),
        (("seed=9",), "test", 7, 9),
        (("seed=0", "split=val", "episodes=6"), "val", 6, 0),
    ],
)
def test_an_evaluation_takes_the_split_the_seed_and_the_number_that_were_asked_for(
    run_on_images: Done,
    tmp_path: Path,
    asked: tuple[str, ...],
    split: str,
    episodes: int,
    seed: int,
) -> None:
    done = run_on_images
    config = composed("eval", [f"ckpt={done.directory}", "device=cpu", *asked])
    returned = eval.run(config, tmp_path / "eval")
    found = json.loads((tmp_path / "eval" / "result.json").read_text())
    own = replace(done.config, seed=seed)
    losses, scores = by_hand.trace(own, build_data(own, CPU), done.hand.chosen, split, episodes)
    assert done.hand.best is not None and found["step"] == done.hand.best["step"]
    assert_figures(found[split], expected_test(done, scores, losses) | {"seed": seed})
    assert returned == found[split]["accuracy"]


def test_other_seeds_give_other_figures_of_the_same_model(
    run_on_images: Done, tmp_path: Path
) -> None:
    scores = set()
    for seed in range(3):
        overrides = [f"ckpt={run_on_images.directory}", "device=cpu", f"seed={seed}"]
        eval.run(composed("eval", overrides), tmp_path / str(seed))
        figures = json.loads((tmp_path / str(seed) / "result.json").read_text())["test"]
        scores.add(tuple(figures["loss_per_inner_step"]))
    assert len(scores) == 3


def test_the_best_model_is_not_always_the_last(run_on_images: Done) -> None:
    """Else the tests above could not tell the two apart."""
    assert run_on_images.result["best"]["step"] < 8
