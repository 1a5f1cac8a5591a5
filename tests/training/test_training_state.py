"""A state that is saved and restored goes on with the same bits, random numbers included."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.components.algo.maml import MamlConfig
from metarun.components.backbone.mlp import MLP, MlpConfig
from metarun.components.data.sinusoid import SinusoidConfig
from metarun.components.inner_opt.adam import AdamConfig
from metarun.components.outer_opt.adam import OuterAdamConfig
from metarun.config.catalogue import Component, components
from metarun.config.run import TrainConfig, TrainerConfig
from metarun.rundir import checkpoint
from metarun.training.loop import meta_step, remember, skip
from metarun.training.setup import Setup, build
from metarun.training.state import TrainState, fresh, restore, snapshot


@dataclass
class NoisyConfig:
    """A backbone with dropout."""

    name: str = "noisy"


class Noisy(nn.Module):
    def __init__(self, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.net, self.drop = MLP(shape, outputs, hidden=(6,)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.drop(self.net.features(x)))


def setup_of(backbone: Any, compile: str = "none", **engine: Any) -> Setup:
    config = TrainConfig(
        seed=2,
        algo=MamlConfig(inner_steps=2),
        data=SinusoidConfig(),
        backbone=backbone,
        inner_opt=AdamConfig(lr=0.05, learn=["lr"]),
        outer_opt=OuterAdamConfig(schedule="cosine", min_lr=1e-4),
        trainer=TrainerConfig(steps=12, meta_batch=3, keep_best=2),
    )
    config.engine.compile = compile
    for name, value in engine.items():
        setattr(config.engine, name, value)
    return build(config, torch.device("cpu"))


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif hasattr(theirs, "state_dict"):
        assert_same(ours.state_dict(), theirs.state_dict())
    else:
        assert ours == theirs


@pytest.mark.parametrize("compile", ["none", "replay"])
def test_all_of_a_state_comes_back(tmp_path: Path, compile: str) -> None:
    """Whatever fields there are; each has another value here than in a fresh state."""
    setup = setup_of(MlpConfig(hidden=[6]), compile)
    state = fresh(setup)
    for score in (0.7, 0.5, 0.6):
        for _ in range(2):
            meta_step(setup, state)
        state.last_eval = state.step
        remember(setup, state, {"score": score, "ci95": 0.1})
    skip(state, 5)
    state.elapsed = 12.5
    new = fresh(setup)
    path = checkpoint.save(tmp_path, snapshot(setup, state), 1, None)
    back = restore(setup, checkpoint.load(path))
    for field in fields(TrainState):
        assert_same(getattr(back, field.name), getattr(state, field.name))
        with pytest.raises(AssertionError):
            assert_same(getattr(new, field.name), getattr(state, field.name))


@pytest.mark.parametrize(
    ("noisy", "engine"),
    [
        (True, {"batching": "vmap"}),
        (True, {"batching": "loop"}),
        (True, {"batching": "loop", "gradient": "checkpoint"}),
        (False, {"batching": "loop", "gradient": "evolution", "samples": 2}),
        (False, {"batching": "vmap", "gradient": "evolution", "samples": 2}),
    ],
    ids=str,
)
def test_a_resumed_run_draws_the_random_numbers_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy: bool, engine: dict[str, Any]
) -> None:
    """Masks of dropout, the points of `evolution`; in a process that has drawn others since."""
    monkeypatch.setitem(components("backbone"), "noisy", Component(NoisyConfig, Noisy))
    backbone = NoisyConfig() if noisy else MlpConfig(hidden=[6])
    setup = setup_of(backbone, **engine)
    state = fresh(setup)
    for step in range(6):
        if step == 3:
            path = checkpoint.save(tmp_path, snapshot(setup, state), 1, None)
        meta_step(setup, state)
    for drawn in range(2):  # how many numbers the new process has drawn does not matter
        again = setup_of(backbone, **engine)
        torch.randn(1 + 5 * drawn)
        resumed = restore(again, checkpoint.load(path))
        for _ in range(3):
            meta_step(again, resumed)
        assert_same(
            {n: v.detach() for n, v in resumed.meta.items()},
            {n: v.detach() for n, v in state.meta.items()},
        )
        assert_same(resumed.recent, state.recent)
