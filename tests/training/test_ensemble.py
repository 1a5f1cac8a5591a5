"""Several checkpoints together: the mean of their outputs, whatever the method."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.algo.base import Trace
from metarun.config.compose import composed
from metarun.errors import CheckpointError, ConfigError
from metarun.rundir import checkpoint
from metarun.rundir.top import best_validations, load_each
from metarun.training.device import choose_device
from metarun.training.ensemble import ensemble_trace
from metarun.training.evaluation import evaluate
from metarun.training.setup import Setup, build
from metarun.training.state import fresh, restore_meta, snapshot
from tests.conftest import Metarun, swap_builder
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

RUN = (
    "train", "data=glyphs", "backbone=mlp", "backbone.hidden=[8]", "task.way=3", "task.query=3",
    "trainer.meta_batch=2", "trainer.eval_episodes=4", "trainer.test_episodes=5",
    "trainer.eval_every=2", "trainer.steps=8", "engine.precision=float64", "outer_opt.lr=0.03",
    "hydra.run.dir=run",
)  # fmt: skip


def members_of(setup: Setup, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Checkpoints of different meta-parameters, and those."""
    metas = [{n: v.detach() for n, v in stirred(setup, seed=i).items()} for i in range(count)]
    state, contents = fresh(setup), []
    for meta in metas:
        state.meta = meta
        contents.append(snapshot(setup, state))
    return contents, metas


def by_hand(setup: Setup, metas: list[dict[str, Tensor]], index: int) -> tuple[Tensor, Tensor]:
    """Loss and score of the mean output for a test task, in plain torch."""
    task = task_of(setup, index, "test")
    way = setup.config.task.way if setup.source.kind == "classification" else None
    assert setup.algorithm.adapt is not None
    found = [setup.algorithm.adapt(m, task.support_x, task.support_y, way) for m in metas]
    mean = sum((predict(task.query_x) for predict in found), torch.zeros(())) / len(metas)
    if way is None:
        error = (mean - task.query_y).square().mean()
        return error, error
    hits = (mean.argmax(1) == task.query_y).double().mean()
    return F.cross_entropy(mean, task.query_y), hits


@pytest.mark.parametrize(
    "settings",
    [
        (*IMAGES, "algo=maml", "engine.batching=vmap"),
        (*IMAGES, "algo=maml", "engine.batching=loop"),
        (*SINE, "algo=maml"),
        (*SINE, "algo=imaml", "algo.variant=code"),
        (*IMAGES, "algo=protonet", "backbone.norm=support"),
        (*IMAGES, "algo=transductive_finetuning", "algo.eval_inner_steps=2"),
        (*SINE, "algo=cnp"),
    ],
)
def test_it_scores_the_mean_of_the_outputs(settings: tuple[str, ...]) -> None:
    setup = setup_of(*settings)
    contents, metas = members_of(setup, 3)
    trace = ensemble_trace(setup, contents, metas)
    tasks = setup.source.sample("test", 0, 2)
    with torch.no_grad():
        found = trace({}, tasks)
        alone = setup.trace(metas[0], tasks)
    assert found.query_loss.shape == alone.query_loss.shape, "a value after each inner step"
    if not setup.algorithm.transductive:  # whose predictor adapts to what it is asked
        for i in range(2):
            loss, score = by_hand(setup, metas, i)
            torch.testing.assert_close(found.query_loss[i, -1], loss.detach(), rtol=1e-9, atol=0)
            torch.testing.assert_close(found.query_score[i, -1], score.detach().double())
    assert not torch.allclose(found.query_loss, alone.query_loss)
    one = ensemble_trace(setup, contents[:1], metas[:1])({}, tasks)
    torch.testing.assert_close(one.query_loss, alone.query_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.query_score, alone.query_score)


def test_each_member_has_its_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(nn.Module):
        """Its output depends on a buffer that training changes."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
            self.head = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen = self.seen + 1
            scores: Tensor = self.head(x) + self.seen
            return scores

    swap_builder(monkeypatch, "backbone", "mlp", lambda *_, **__: Counting())
    setup = setup_of(*SINE, "algo.eval_inner_steps=0")
    contents, metas = members_of(setup, 2)
    metas[1] = metas[0]
    for i, content in enumerate(contents):
        content["buffers"]["seen"] = torch.tensor(2.0 * i, dtype=torch.float64)
    tasks = setup.source.sample("test", 0, 2)
    head = metas[0]["head.weight"] * tasks.query_x + metas[0]["head.bias"]
    expected = (head + 1 - tasks.query_y).square().mean((1, 2))
    found = ensemble_trace(setup, contents, metas)({}, tasks)
    torch.testing.assert_close(found.query_loss[:, 0], expected)


def test_outputs_that_are_not_stated_or_not_those_of_the_trace_are_refused() -> None:
    setup = setup_of(*SINE)
    contents, metas = members_of(setup, 2)
    tasks = setup.source.sample("test", 0, 2)
    for other, words in (
        (setup.__class__(**{**vars(setup), "outputs": None}), "does not give its outputs"),
        (setup.__class__(**{**vars(setup), "trace": _doubled(setup)}), "has other losses than"),
    ):
        with pytest.raises(ConfigError, match=words):
            ensemble_trace(other, contents, metas)({}, tasks)


def _doubled(setup: Setup) -> Any:
    def trace(meta: Any, tasks: Any) -> Trace:
        found = setup.trace(meta, tasks)
        return Trace(2 * found.query_loss, found.query_score)

    return trace


def test_a_run_is_tested_by_its_best_checkpoints_together(tmp_path: Path, metarun: Metarun) -> None:
    done = metarun(*RUN, "trainer.keep_best=3", "trainer.ensemble=2", "trainer.keep_last=1")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    together, folder = result["ensemble"], tmp_path / "run" / "checkpoints"
    top = checkpoint.load(folder / "last.safetensors")["top"]
    assert together["ensemble"] == top[:2] and "ensemble" not in result["test"]
    assert "mean outputs of 2 checkpoints" in done.stdout
    contents = [checkpoint.load(folder / f"best-step-{v['step']:08d}.safetensors") for v in top]
    config = composed("train", [*RUN[1:-1]])
    setup = build(config, choose_device("cpu"))
    metas = [restore_meta(setup, content) for content in contents]
    losses, hits = zip(*(by_hand(setup, metas[:2], i) for i in range(5)), strict=True)
    assert together["accuracy"] == pytest.approx(float(torch.stack(hits).mean()))
    loss = float(torch.stack(losses).mean())
    assert together["loss_per_inner_step"][-1] == pytest.approx(loss, rel=1e-9)
    alone = evaluate(setup.trace, setup.objective, metas[0], setup.source, "test", 5)
    assert result["test"]["accuracy"] == alone.score
    # The same from the run's directory, and of any other number that was kept.
    metarun("eval", "ckpt=run", "ensemble=2", "hydra.run.dir=two")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["test"]["loss_per_inner_step"] == together["loss_per_inner_step"]
    assert two["test"]["ensemble"] == top[:2]
    metarun("eval", "ckpt=run", "ensemble=1", "hydra.run.dir=one")
    one = json.loads((tmp_path / "one" / "result.json").read_text())["test"]
    assert one["accuracy_per_task"] == result["test"]["accuracy_per_task"]
    for more, words in (
        (["ckpt=run", "ensemble=4"], "run has kept 3 of its best checkpoints"),
        (["ckpt=run/checkpoints/last.safetensors", "ensemble=2"], "is a file; name the directory"),
    ):
        assert words in metarun("eval", *more, "hydra.run.dir=no", code=2).stderr
    # Killed during the test, the run goes on to the same result.
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "status.json").write_text("{}")
    metarun(*RUN, "trainer.keep_best=3", "trainer.ensemble=2", "trainer.keep_last=1")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["ensemble"] == together
    # A damaged member is replaced by a copy, or named.
    members, best = best_validations(tmp_path / "run", 3)
    damaged = members / f"best-step-{best[2]['step']:08d}.safetensors"
    damaged.write_bytes(b"")
    if (spare := members / f"step-{best[2]['step']:08d}.safetensors").exists():
        spare.unlink()
    with pytest.raises(CheckpointError, match=f"meta-step {best[2]['step']}, which is among"):
        load_each(members, best)


def test_what_a_run_cannot_average_is_refused() -> None:
    for more, words in (
        (["trainer.ensemble=2"], "only trainer.keep_best=1 checkpoints are kept"),
        (
            ["trainer.ensemble=5", "trainer.keep_best=5", "trainer.steps=7"],
            "there are only 4 validations",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            composed("train", [*RUN[1:-1], *more])
