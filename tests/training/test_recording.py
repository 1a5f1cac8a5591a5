"""`engine.compile`: recorded meta-steps train with the same bits, or the run says why not."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError

from metarun.errors import ConfigError, RunError
from metarun.rundir import checkpoint
from metarun.training import plan, programs
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import fresh
from tests.conftest import Metarun
from tests.setups import config_of

TINY = (
    "data=sinusoid",
    "backbone=mlp",
    "backbone.hidden=[6]",
    "trainer.meta_batch=5",
    "trainer.steps=100",
)


def setup_of(*overrides: str) -> Setup:
    return build(config_of(*TINY, *overrides), torch.device("cpu"))


def trained(setup: Setup, steps: int = 5) -> dict[str, torch.Tensor]:
    state = fresh(setup)
    for _ in range(steps):
        meta_step(setup, state)
    return {name: value.detach() for name, value in state.meta.items()}


@pytest.mark.parametrize(
    "choice",
    [
        ("algo.inner_steps=3",),
        ("engine.batching=loop", "algo.order=1"),
        ("engine.chunk=2", "inner_opt=adam", "inner_opt.learn=[lr]"),
        ("engine.gradient=mixed",),
        ("engine.gradient=checkpoint", "algo.inner_steps=3", "inner_opt.learn=[lr]"),
    ],
    ids=" ".join,
)
def test_recorded_meta_steps_have_the_same_bits(choice: tuple[str, ...]) -> None:
    plain = trained(setup_of(*choice, "engine.compile=none"))
    for how in ("auto", "replay"):
        for name, value in trained(setup_of(*choice, f"engine.compile={how}")).items():
            assert torch.equal(value, plain[name]), (how, name)


def backends(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[str]:
    """What a run records by what: a chunk and the whole in training, and in evaluation."""
    made = []

    def counted(fn: Callable[..., Any], backend: str = "replay", **options: Any) -> Any:
        made.append(backend)
        return fn

    monkeypatch.setattr(programs, "recorded", counted)
    setup_of(*overrides)
    return made


def test_auto_compiles_the_training_of_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends(monkeypatch, "engine.compile=none") == []
    assert set(backends(monkeypatch)) == {"replay"}
    long = f"trainer.steps={plan.LONG_RUN}"
    found = backends(monkeypatch, long)
    assert "inductor" in found and found[-1] == "replay", "evaluation is not compiled"
    assert backends(monkeypatch, long, "engine.gradient=mixed") == []
    found = backends(monkeypatch, long, "engine.gradient=checkpoint")
    assert found[0] == "inductor" and len(found) == 2, "its step, and nothing else"
    conv = nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv1d(1, 1, 1), nn.Flatten())
    monkeypatch.setattr("metarun.training.setup.build_model", lambda *_, **__: conv)
    assert "inductor" in backends(monkeypatch, "trainer.steps=500")
    assert set(backends(monkeypatch, "trainer.steps=499")) == {"replay"}
    monkeypatch.setenv("PATH", "")
    assert set(backends(monkeypatch, long)) == {"replay"}, "there is no compiler"


def test_a_compiled_run_is_the_same_up_to_rounding(caplog: pytest.LogCaptureFixture) -> None:
    double = "engine.precision=float64"
    plain = trained(setup_of(double, "engine.compile=none"))
    with caplog.at_level(logging.INFO, "metarun"):
        ours = trained(setup_of(double, "engine.compile=inductor"))
    assert "compiled meta-steps in" in caplog.text
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-10, atol=1e-10)


def test_what_inductor_cannot_compile_is_replayed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise NotImplementedError("no such operation")

    monkeypatch.setattr("torch._inductor.standalone_compile", fail)
    with caplog.at_level(logging.INFO, "metarun"):
        ours = trained(setup_of(f"trainer.steps={plan.LONG_RUN}"))
    assert "not compiled: inductor fails: NotImplementedError: no such operation" in caplog.text
    plain = trained(setup_of("engine.compile=none", f"trainer.steps={plan.LONG_RUN}"))
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())
    with pytest.raises(
        ConfigError, match=r"compiled: inductor .* use engine\.compile=replay or none"
    ):
        trained(setup_of("engine.compile=inductor"))


def test_without_a_compiler_it_cannot_be_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler .* use engine\.compile=replay"):
        setup_of("engine.compile=inductor")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_full_disk_ends_a_run_that_is_to_be_compiled(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """Replayed now and compiled when it is resumed, it would have other bits."""

    def fail(*args: object, **options: object) -> None:
        full = OSError(28, "No space left on device")
        raise InductorError(full, None) if wrapped else full

    monkeypatch.setattr("torch._inductor.standalone_compile", fail)
    with pytest.raises(RunError, match=r"cannot be kept in .*: No space left on device; set"):
        trained(setup_of(f"trainer.steps={plan.LONG_RUN}"))


def test_a_cache_that_cannot_be_made_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "file" / "cache"))
    trained(setup_of())
    assert "file" not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")


def test_what_is_too_long_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(programs, "MOST_OPERATIONS", 50)
    with caplog.at_level(logging.INFO, "metarun"):
        ours = trained(setup_of(f"trainer.steps={plan.LONG_RUN}"))
    assert caplog.text.count("not recorded: it takes more than 50 operations") == 1
    plain = trained(setup_of("engine.compile=none", f"trainer.steps={plan.LONG_RUN}"))
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Dropout(0.5), nn.Linear(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)
        return result


def test_a_network_with_dropout_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("metarun.training.setup.build_model", lambda *_, **__: Noisy())
    with caplog.at_level(logging.INFO, "metarun"):
        ours = trained(setup_of())
    assert "meta-steps are not recorded: it draws random numbers" in caplog.text
    plain = trained(setup_of("engine.compile=none"))
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())
    with pytest.raises(ConfigError, match=r"engine\.compile=replay: .* use engine\.compile=none"):
        trained(setup_of("engine.compile=replay"))


def test_whole_runs_are_the_same(metarun: Metarun, tmp_path: Path) -> None:
    short = ["trainer.steps=6", "trainer.eval_episodes=40", "trainer.test_episodes=70"]
    for how in ("auto", "none"):
        metarun("train", *TINY, *short, f"engine.compile={how}", f"hydra.run.dir={how}")
    results = [json.loads((tmp_path / how / "result.json").read_text()) for how in ("auto", "none")]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["best"] == results[1]["best"]


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint"])
def test_a_compiled_run_resumes_with_the_bits_of_an_undisturbed_one(
    gradient: str, metarun: Metarun, environment: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    """Its programs are kept in the cache, also by a new process.

    There torch chooses a place of its own when its compiler is first imported.
    """
    command = ["train", *TINY, "trainer.steps=8", "trainer.checkpoint_every=4"]
    command += ["engine.compile=inductor", "trainer.eval_episodes=3", "trainer.test_episodes=3"]
    command += [f"engine.gradient={gradient}", "algo.eval_inner_steps=1", "hydra.run.dir=run"]
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    kept = {*(cache / "compiled").glob("fxgraph/*/*")}
    if gradient == "reverse":
        new = [sys.executable, "-m", "metarun", *command]
        subprocess.run(new, cwd=tmp_path, env=environment, check=True)
    else:
        metarun(*command)
    assert {*(cache / "compiled").glob("fxgraph/*/*")} > kept
    whole = checkpoint.load(checkpoints / "last.safetensors")["meta"]
    # As if it had been killed after meta-step 4.
    (checkpoints / "step-00000004.safetensors").replace(checkpoints / "last.safetensors")
    (checkpoints / "step-00000008.safetensors").unlink()
    (folder / "status.json").unlink()
    metarun(*command)
    assert json.loads((folder / "status.json").read_text())["attempts"] == 1, "it ran once more"
    again = checkpoint.load(checkpoints / "last.safetensors")["meta"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
