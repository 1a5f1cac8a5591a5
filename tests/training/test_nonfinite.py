"""Gradients that are not finite: the run stops, or leaves out the meta-step and says so."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metarun.rundir import checkpoint
from metarun.rundir.checkpoint_fields import ELAPSED_FIELD
from metarun.training.loop import meta_step
from metarun.training.setup import build
from metarun.training.state import fresh
from tests.conftest import Metarun, swap_builder
from tests.setups import config_of

PLUGIN = '''
"""Sine curves, of which some are not a number."""

from dataclasses import dataclass

from metarun.components import register
from metarun.components.data.sinusoid import Sinusoids


@dataclass
class HoledConfig:
    name: str = "holed"
    every: int = 3


class Holed(Sinusoids):
    def __init__(self, every, **options):
        super().__init__(**options)
        self.every = every

    def sample(self, split, start, count):
        episodes = super().sample(split, start, count)
        every = 2 * self.every  # of a meta-batch of two, the first episode
        holes = [i for i in range(count) if split == "train" and (start + i) % every == 2]
        episodes.query_y[holes, 0, 0] = float("nan")
        return episodes


def build(task, seed, device, dtype, every):
    shape = {"shot": task.shot, "query": task.query}
    return Holed(every, **shape, seed=seed, device=device, dtype=dtype)


register("data", "holed", HoledConfig, build)
'''

RUN = (
    "train", "+plugins=[holed]", "data=holed", "backbone=mlp", "backbone.hidden=[4]",
    "trainer.steps=12", "trainer.meta_batch=2", "trainer.eval_episodes=3",
    "trainer.test_episodes=3", "trainer.eval_every=6", "trainer.checkpoint_every=2",
    "trainer.keep_every=2", "outer_opt.schedule=cosine",
)  # fmt: skip


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path) -> None:
    (tmp_path / "holed.py").write_text(PLUGIN)


def load(path: Path) -> dict:
    return {key: value for key, value in checkpoint.load(path).items() if key != ELAPSED_FIELD}


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def test_stop_is_the_default_and_names_the_meta_step(tmp_path: Path, metarun: Metarun) -> None:
    failed = metarun(*RUN, "hydra.run.dir=run", code=1)
    assert "the loss or its gradient became NaN or infinite at meta-step 2" in failed.stderr
    assert "trainer.nonfinite=skip" in failed.stderr


def test_a_skipped_meta_step_changes_nothing_but_the_counters(
    tmp_path: Path, metarun: Metarun
) -> None:
    """Steps 1, 4, 7 and 10, counted from 0, have a gradient that is not a number."""
    metarun(*RUN, "trainer.nonfinite=skip", "trainer.log_every=1", "hydra.run.dir=run")
    folder = tmp_path / "run" / "checkpoints"
    before, after = (
        load(folder / "step-00000004.safetensors"),
        load(folder / "step-00000006.safetensors"),
    )
    assert (before["skipped"], after["skipped"]) == (1, 2)
    last = load(folder / "last.safetensors")
    assert (last["step"], last["skipped"]) == (12, 4)
    assert last["scheduler"]["last_epoch"] == 8
    assert {int(s["step"]) for s in last["outer_optimizer"]["state"].values()} == {8}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counted = {line["step"]: line["train/skipped"] for line in lines if "train/skipped" in line}
    assert [counted[step] for step in range(1, 13)] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    skipped = [
        line["step"] for line in lines if "train/skipped" in line and "train/loss" not in line
    ]
    assert skipped == [2, 5, 8, 11]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["skipped_steps"] == 4


def test_parameters_and_optimizer_stay_as_they_were(tmp_path: Path, metarun: Metarun) -> None:
    """Every second step is skipped: two steps on, one has counted."""
    options = ("data.every=2", "trainer.nonfinite=skip", "trainer.checkpoint_every=1")
    metarun(*RUN, *options, "trainer.keep_every=1", "hydra.run.dir=run")
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 3, 5):
        before = load(folder / f"step-{step:08d}.safetensors")
        after = load(folder / f"step-{step + 1:08d}.safetensors")
        for key in ("meta", "outer_optimizer", "scheduler", "recent"):
            assert_same(before[key], after[key])
        assert after["skipped"] == before["skipped"] + 1
        moved = load(folder / f"step-{step + 2:08d}.safetensors")
        assert not torch.equal(after["meta"]["head.bias"], moved["meta"]["head.bias"])


def test_a_resumed_run_has_the_same_bits_and_counts(tmp_path: Path, metarun: Metarun) -> None:
    skip = "trainer.nonfinite=skip"
    metarun(*RUN, skip, "hydra.run.dir=whole")
    metarun(*RUN, skip, "hydra.run.dir=cut")
    cut = tmp_path / "cut" / "checkpoints"
    (cut / "last.safetensors").write_bytes((cut / "step-00000006.safetensors").read_bytes())
    (tmp_path / "cut" / "status.json").write_text("{}")
    done = metarun(*RUN, skip, "hydra.run.dir=cut")
    assert "resuming after meta-step 6" in done.stderr
    assert_same(
        load(cut / "last.safetensors"),
        load(tmp_path / "whole" / "checkpoints" / "last.safetensors"),
    )


def test_a_stopped_run_goes_on_with_skipping(tmp_path: Path, metarun: Metarun) -> None:
    metarun(*RUN, "data.every=9", "hydra.run.dir=run", code=1)
    metarun(*RUN, "data.every=9", "trainer.nonfinite=skip", "hydra.run.dir=run")
    last = load(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert (last["step"], last["skipped"]) == (12, 2)


def test_beyond_the_limit_the_run_fails(tmp_path: Path, metarun: Metarun) -> None:
    limit = ("trainer.nonfinite=skip", "trainer.max_skipped=2", "hydra.run.dir=run")
    failed = metarun(*RUN, *limit, code=1)
    assert "meta-step 8 had a loss or a gradient that is NaN or infinite, as had 2" in failed.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert load(tmp_path / "run" / "checkpoints" / "last.safetensors")["step"] == 6


class Rooted(nn.Module):
    """Its output is finite; its derivative by `root` is not."""

    batch_norm = "none"

    def __init__(self) -> None:
        super().__init__()
        self.root, self.body, self.head = (
            nn.Parameter(torch.ones(1)), nn.Linear(1, 3), nn.Linear(3, 1),
        )  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) + (0 * self.root).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x))
        return result


def test_a_meta_step_with_a_finite_loss_is_skipped_for_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swap_builder(monkeypatch, "backbone", "mlp", lambda *_, **__: Rooted())
    given = ["data=sinusoid", "backbone=mlp", "algo=anil", "trainer.nonfinite=skip"]
    config = config_of(*given, "trainer.meta_batch=2", "engine.compile=none")
    setup = build(config, torch.device("cpu"))
    state = fresh(setup)
    before = {name: leaf.detach().clone() for name, leaf in state.meta.items()}
    grads, row = setup.gradient(state.meta, setup.train_tasks.sample(0, 2))
    assert row.loss.isfinite() and row.score.isfinite() and not grads["root"].isfinite().all()
    for step in (1, 2):
        meta_step(setup, state)
        assert (state.step, state.skipped) == (step, step)
    assert_same({name: leaf.detach() for name, leaf in state.meta.items()}, before)
