"""`engine.chunk=auto`: fewer tasks at a time where memory runs out, and the same results."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metarun.errors import ConfigError, is_out_of_memory
from metarun.rundir import checkpoint
from metarun.system.ranks import Ranks
from metarun.training import programs
from metarun.training.chunking import AsManyAsFit
from metarun.training.evaluation import evaluate_split
from metarun.training.loop import meta_step
from metarun.training.state import chunks_found, fresh, restore, snapshot
from metarun.unroll import tasks as tasks_module
from metarun.unroll._torch import pytree
from tests.setups import setup_of

RUN = ("data=sinusoid", "backbone=mlp", "backbone.hidden=[6]", "trainer.meta_batch=7")


def short_of_memory(monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """Let more than so many tasks at a time run out of memory; gives what was tried."""
    tried: list[int] = []

    def limited(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(fn: Any, batching: str, chunk: int | None = None, *more: Any) -> Any:
            run = make(fn, batching, chunk, *more)

            def call(meta: Any, tasks: Any) -> Any:
                size = min(chunk or 10**6, len(pytree.tree_leaves(tasks)[0]))
                tried.append(size)
                if size > room:
                    torch.rand(3)  # what was drawn before it failed is drawn again
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                return run(meta, tasks)

            return call

        return made

    for name in ("mean_gradient", "task_mapping"):
        monkeypatch.setattr(programs, name, limited(getattr(programs, name)))
    return tried


@pytest.mark.parametrize("compile_", ["none", "replay"])
def test_a_run_takes_as_many_as_fit(
    compile_: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    how = f"engine.compile={compile_}"
    plain = setup_of(*RUN, how, "engine.chunk=2")
    wanted = fresh(plain)
    for _ in range(3):
        meta_step(plain, wanted)
    scores = evaluate_split(plain, plain.trace, wanted.meta, "val", 5, lambda done: None).scores
    tried = short_of_memory(monkeypatch, room=2)
    caplog.set_level(logging.INFO)
    setup = setup_of(*RUN, how, "engine.chunk=auto")
    state = fresh(setup)
    for _ in range(3):
        meta_step(setup, state)
    assert tried[:5] == [7, 4, 2, 2, 2]
    assert "meta-steps: 7 tasks at a time need more memory than there is; from here on 4" in (
        caplog.text
    )
    for name, value in wanted.meta.items():
        assert torch.equal(value, state.meta[name])
    found = evaluate_split(setup, setup.trace, state.meta, "val", 5, lambda done: None).scores
    torch.testing.assert_close(found, scores)
    assert {name: fitted.chunk for name, fitted in setup.chunks.items()} == {
        "gradient": 2, "trace": 2, "outputs": None,
    }  # fmt: skip


def test_a_resumed_run_begins_with_what_fitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = (*RUN, "engine.compile=none", "engine.chunk=auto")
    with monkeypatch.context() as patch:
        short_of_memory(patch, room=2)
        setup = setup_of(*settings)
        state = fresh(setup)
        meta_step(setup, state)
        checkpoint.save(
            tmp_path, snapshot(setup, state, chunks_found(setup)), keep_last=1, keep_every=None
        )
        meta_step(setup, state)
    again = setup_of(*settings)  # where there is room for all
    content = checkpoint.load(tmp_path / "last.safetensors")
    assert content["chunks"] == [{"gradient": 2}]
    resumed = restore(again, content)
    meta_step(again, resumed)
    assert again.chunks["gradient"].chunk == 2
    for name, value in state.meta.items():
        assert torch.equal(value, resumed.meta[name])


def test_one_task_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = short_of_memory(monkeypatch, room=0)
    setup = setup_of(*RUN, "engine.chunk=auto")
    with pytest.raises(torch.OutOfMemoryError):
        meta_step(setup, fresh(setup))
    assert tried == [7, 4, 2, 1]


def test_other_errors_are_none_of_memory() -> None:
    def of_chunk(chunk: int | None) -> Callable[..., Any]:
        def fail(meta: Any, tasks: Any) -> None:
            raise RuntimeError("something else")

        return fail

    fitted = AsManyAsFit(of_chunk, "meta-steps")
    with pytest.raises(RuntimeError, match="something else"):
        fitted({}, torch.zeros(4))
    assert fitted.chunk is None


def test_a_call_is_made_again_from_the_same_random_state() -> None:
    def of_chunk(chunk: int | None) -> Callable[..., Any]:
        def draw(meta: Any, tasks: Any) -> torch.Tensor:
            drawn = torch.rand(3)
            if chunk is None:
                raise torch.OutOfMemoryError
            return drawn

        return draw

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(AsManyAsFit(of_chunk, "meta-steps")({}, torch.zeros(4)), wanted)


@pytest.mark.parametrize("chunk", ["some", "0", "1.5", "[1]", "true"])
def test_other_values_are_refused(chunk: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.chunk"):
        setup_of(*RUN, f"engine.chunk={chunk}")


@pytest.mark.parametrize("compile_", ["none", "replay"])
def test_memory_may_run_out_while_a_recording_is_made(
    compile_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tasks_module._run

    def limited(fn: Any, batching: Any, meta: Any, part: Any) -> Any:
        if len(pytree.tree_leaves(part)[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(fn, batching, meta, part)

    monkeypatch.setattr(tasks_module, "_run", limited)
    how = (f"engine.compile={compile_}", "engine.chunk=auto", "engine.batching=vmap")
    setup = setup_of(*RUN, *how)
    state = fresh(setup)
    for _ in range(3):
        meta_step(setup, state)
    assert setup.chunks["gradient"].chunk == 2


def test_it_begins_with_the_number_of_the_plan() -> None:
    tried: list[int | None] = []

    def of_chunk(chunk: int | None) -> Callable[..., Any]:
        def fail(meta: Any, tasks: Any) -> None:
            tried.append(chunk)
            raise torch.OutOfMemoryError

        return fail

    with pytest.raises(torch.OutOfMemoryError):
        AsManyAsFit(of_chunk, "meta-steps", first=8)({}, torch.zeros(32))
    assert tried == [None, 4, 2, 1]


@pytest.mark.parametrize(("ranks", "found"), [(1, None), (2, 2), (3, None)])
def test_each_rank_goes_on_with_its_own(ranks: int, found: int | None) -> None:
    setup = setup_of(*RUN, "engine.compile=none", "engine.chunk=auto")
    state = fresh(setup)
    meta_step(setup, state)
    content = snapshot(setup, state, [{"gradient": 3}, {"gradient": 2}])
    restore(replace(setup, ranks=Ranks(rank=ranks - 1, count=ranks)), content)
    assert setup.chunks["gradient"].chunk == found


def test_an_error_may_be_the_cause_of_its_cause() -> None:
    one, other = ConfigError("one"), ConfigError("other")
    one.__cause__, other.__cause__ = other, one
    assert not is_out_of_memory(one)
    other.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(one)
