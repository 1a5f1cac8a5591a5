"""What is random in a run, and from which seed; which tasks a run takes, and how many."""

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.cli import eval
from metarun.components.data.sinusoid import Sinusoids
from metarun.config.catalogue import schemas
from metarun.config.compose import composed
from metarun.episodes.source import Episodes
from metarun.training import run as train
from metarun.training.plan import Batching
from metarun.training.setup import Setup, build
from metarun.training.state import fresh
from metarun.unroll import map_tasks, mean_gradient
from tests.components.test_every_backbone import LONG, SIZES
from tests.conftest import swap_builder
from tests.setups import config_of

CPU = torch.device("cpu")
TINY = (
    "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]", "device=cpu", "task.shot=2",
    "task.query=3", "trainer.steps=4", "trainer.meta_batch=3", "trainer.eval_every=2",
    "trainer.eval_episodes=5", "trainer.test_episodes=7", "engine.compile=none",
)  # fmt: skip
asked: list[tuple[str, int, int, int]] = []
"""Seed of the run, split, start and count of every draw of `Watched`."""


class Watched(Sinusoids):
    """Sine curves that write down what is drawn of them."""

    def sample(self, split: str, start: int, count: int) -> Episodes:
        asked.append((self.seed, split, start, count))
        return super().sample(split, start, count)


def watched(task: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Watched:
    source = Watched(shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)
    source.identity = "watched"  # else episodes would be drawn for one
    return source


@pytest.fixture(scope="module", autouse=True)
def watching() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        swap_builder(patch, "data", "sinusoid", watched)
        yield


def setup_of(*overrides: str) -> Setup:
    return build(config_of(*TINY, *overrides), CPU)


def weights_of(*overrides: str) -> list[Tensor]:
    return list(fresh(setup_of(*overrides)).meta.values())


def drawn(split: str) -> list[int]:
    """The indices of all episodes that were drawn of a split, in order, since `asked.clear`."""
    return [i for _, s, start, count in asked if s == split for i in range(start, start + count)]


@pytest.mark.parametrize("name", schemas("backbone"))
def test_every_seed_has_initial_weights_of_its_own(name: str, monkeypatch: Any) -> None:
    small = [setting for setting in SIZES.get(name, ()) if setting.startswith("backbone.")]
    own = (f"backbone={name}", *small)

    def with_images(*given: Any) -> Watched:
        source = watched(*given)
        source.input_shape = (1,) if name == "mlp" else (1, 28, 28)  # type: ignore[assignment]
        return source

    swap_builder(monkeypatch, "data", "sinusoid", with_images)
    plain = [a for a in TINY if not a.startswith("backbone")]

    def weights(seed: int) -> list[Tensor]:
        config = config_of(*plain, *own, f"seed={seed}")
        return list(fresh(build(config, CPU)).meta.values())

    seeds = (1,) if name in LONG else (1, 2, 2**40)
    first, again, others = weights(0), weights(0), [weights(seed) for seed in seeds]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    matrices = [i for i, value in enumerate(first) if value.dim() > 1]
    assert matrices
    for i in matrices:
        pairs = combinations([run[i] for run in (first, *others)], 2)
        assert not any(torch.equal(a, b) for a, b in pairs)


def test_initial_weights_depend_on_nothing_but_the_seed_and_the_network() -> None:
    expected = weights_of("seed=5")
    for change in (
        "task.shot=9", "trainer.meta_batch=2", "inner_opt.lr=0.3", "inner_opt=adam", "algo=anil",
        "outer_opt=sgd", "trainer.steps=9", "engine.batching=loop",
    ):  # fmt: skip
        torch.manual_seed(77)
        torch.rand(3)
        found = weights_of("seed=5", change)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), change


def test_a_run_takes_its_tasks_from_the_right_split_with_its_own_seed(tmp_path: Path) -> None:
    asked.clear()
    train.run(config_of(*TINY, "seed=6"), tmp_path / "run")
    assert {seed for seed, *_ in asked} == {6}
    train_tasks, steps, batch = drawn("train"), 4, 3
    assert train_tasks[: steps * batch] == list(range(steps * batch)), "each once, in order"
    assert drawn("val") == [*range(5), *range(5)], "the same ones at each of two validations"
    assert drawn("test") == list(range(7))
    order = [split for _, split, _, _ in asked]
    assert order.index("test") > len(order) - 1 - order[::-1].index("val"), "the test comes last"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_evaluation_takes_its_tasks_from_the_split_asked_for(split: str, tmp_path: Path) -> None:
    train.run(config_of(*TINY, "seed=6"), tmp_path / "run")
    asked.clear()
    given = [f"ckpt={tmp_path / 'run'}", "device=cpu", f"split={split}", "seed=8", "episodes=20"]
    eval.run(composed("eval", given), tmp_path / "eval")
    assert {(seed, s) for seed, s, *_ in asked} == {(8, split)}
    assert drawn(split) == list(range(20))
    figures = json.loads((tmp_path / "eval" / "result.json").read_text())[split]
    assert (figures["seed"], figures["episodes"]) == (8, 20)


class Noisy(nn.Module):
    """Half of 64 units are dropped."""

    batch_norm = "none"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = nn.Linear(1, 64), nn.Dropout(0.5)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.body(x)))
        return out


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_every_task_has_a_mask_of_dropout_of_its_own(batching: Batching) -> None:
    """Eight copies of one task: with one mask for all they would have one loss."""
    drop = nn.Dropout(0.5)

    def loss(meta: Any, task: Tensor) -> tuple[Tensor, Tensor]:
        value = (drop(meta["w"]) * task).sum()
        return value, value

    meta, tasks = {"w": torch.rand(64) + 1}, torch.ones(8, 64)
    assert len(set(map_tasks(loss, meta, tasks, batching)[1].tolist())) == 8
    _, losses = mean_gradient(loss, batching)(meta, tasks)
    assert len(set(losses.tolist())) == 8
    _, losses = mean_gradient(loss, batching, chunk=4)(meta, tasks)
    assert len(set(losses.tolist())) == 8, "nor may chunks repeat the masks"


def test_every_inner_step_of_a_run_has_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an inner learning rate of zero, nothing but the mask changes the inner loss."""
    swap_builder(monkeypatch, "backbone", "mlp", lambda *shape, **_: Noisy())
    setup = setup_of("algo.inner_steps=3", "inner_opt.lr=0")
    tasks = setup.source.sample("train", 0, 2)
    meta = {name: value.detach() for name, value in fresh(setup).meta.items()}
    one = Episodes(*(part[:1].expand(2, *part.shape[1:]) for part in tasks))
    inner = torch.stack([setup.gradient(meta, one)[1].inner_losses for _ in range(2)]).flatten()
    assert len(set(inner.tolist())) == 6
