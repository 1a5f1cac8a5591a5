"""Recordings: the same bits as the function itself, or a refusal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

from metarun.components.backbone.norm import BatchNorm
from metarun.unroll import (
    Checkpoint,
    Evolution,
    Implicit,
    RecordingError,
    Truncated,
    adam,
    mean_gradient,
    meta_gradient,
    newton,
    recorded,
    sgd,
    task_mapping,
    unroll,
)

F64 = torch.float64
MODES: dict[str, Any] = {
    "reverse": "reverse",
    "first_order": "first_order",
    "truncated": Truncated(2),
    "checkpoint": "checkpoint",
    "blocks": Checkpoint(2),
    "mixed": "mixed",
    "implicit": Implicit(solver_steps=2),
}


class Tasks(NamedTuple):
    x: Tensor
    y: Tensor


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 3, 3, padding=1),
        BatchNorm(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).double()


def batch(seed: int, count: int = 4) -> Tasks:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, 6, dtype=F64, generator=generator)
    return Tasks(x, torch.randint(3, (count, 5), generator=generator))


def problem(
    optimizer: Any, gradient: Any, model: nn.Module | None = None
) -> tuple[Any, dict[str, Tensor]]:
    model = network() if model is None else model

    def loss(params: Any, step: int, task: Tasks) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (task.x,)), task.y)

    def task_loss(meta: Any, task: Tasks) -> tuple[Tensor, Any]:
        weights = {k: v for k, v in meta.items() if k != "scale"}
        end = unroll(loss, weights, optimizer, 3, context=task, gradient=gradient)
        value = meta["scale"] * loss(end.params, 3, task)
        return value, {"losses": end.losses, "task": value}

    meta = {name: p.detach().clone() for name, p in model.named_parameters()}
    return task_loss, meta | {"scale": torch.tensor(0.5, dtype=F64)}


def assert_same_bits(ours: Any, theirs: Any) -> None:
    ours, theirs = (torch.utils._pytree.tree_leaves(x) for x in (ours, theirs))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("gradient", MODES)
def test_a_replay_has_the_bits_of_the_function(gradient: str, batching: Any) -> None:
    task_loss, meta = problem(sgd(0.1, momentum=0.9), MODES[gradient])
    run = mean_gradient(task_loss, batching, None, recorded)
    for seed in range(3):
        meta = {name: value + 0.01 * seed for name, value in meta.items()}
        expected = meta_gradient(task_loss, meta, batch(seed), batching)
        assert_same_bits(run(meta, batch(seed)), expected)


@pytest.mark.parametrize("optimizer", [adam(0.05), newton(damping=0.1)], ids=["adam", "newton"])
def test_other_optimizers_are_replayed_too(optimizer: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 3)).double()
    task_loss, meta = problem(optimizer, "reverse", model)
    run = mean_gradient(task_loss, "vmap", None, recorded)
    for seed in range(2):
        expected = meta_gradient(task_loss, meta, batch(seed), "vmap")
        assert_same_bits(run(meta, batch(seed)), expected)


def test_python_runs_once_for_each_shape_and_for_comparisons() -> None:
    shapes = []

    def fn(meta: Any, task: Tensor) -> Tensor:
        shapes.append(task.shape)
        return meta["a"] * task.sum()

    run = task_mapping(fn, "vmap", 3, recorded)
    meta = {"a": torch.tensor(2.0)}
    for offset in range(16):
        tasks = torch.arange(10.0).view(5, 2) + offset  # a chunk of three tasks, and one of two
        torch.testing.assert_close(run(meta, tasks), 2 * tasks.sum(1))
    assert len(shapes) == 2 * (1 + 4), "recorded, and compared at replays 1, 2, 4 and 8"


def test_the_first_calls_can_be_left_to_the_function() -> None:
    calls = []

    def fn(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    run = recorded(fn, after=2)
    for value in range(5):
        assert run(torch.tensor(value)) == value + 1
    assert len(calls) == 3 + 2, "and compared at both replays"


def test_a_context_surrounds_each_evaluation_of_the_function_and_no_replay() -> None:
    calls, surrounded = [], []

    @contextmanager
    def evaluating() -> Iterator[None]:
        before = len(calls)
        yield
        surrounded.append((before, len(calls)))

    def fn(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    run = recorded(fn, evaluating=evaluating)
    for value in range(4):
        assert run(torch.tensor(value)) == value + 1
    assert surrounded == [(0, 1), (1, 2), (2, 3)], "recorded, and compared at replays 1 and 2"


def test_layout_and_grad_mode_make_recordings_of_their_own() -> None:
    run = recorded(lambda x: x.reshape(-1) * torch.is_grad_enabled())
    x = torch.arange(9.0).view(3, 3)  # square: its transpose differs by nothing but strides
    assert torch.equal(run(x), x.reshape(-1))
    assert torch.equal(run(x.T), x.T.reshape(-1))
    with torch.no_grad():
        assert torch.equal(run(x), torch.zeros(9))


def test_a_recording_is_not_played_on_memory_of_another_layout() -> None:
    """What reads memory as it lies would give the numbers of other elements."""
    run = recorded(lambda x: x.as_strided((3,), (x.stride(0) + x.stride(1),)))
    x = torch.arange(36.0).view(6, 6)
    for layout in (x[:3, :3], x[:3, :3].clone(), x[::2, ::2], x[:3, ::2].T):
        assert torch.equal(run(layout), layout.diagonal())


def test_arguments_that_need_gradients_are_taken_as_values() -> None:
    w = torch.tensor(3.0, requires_grad=True)
    assert_same_bits(recorded(torch.func.grad(lambda x: x**2))(w), torch.tensor(6.0))


def data_dependent(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def with_dropout(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("fn", "arguments", "reason"),
    [
        (data_dependent, (torch.ones(2),), "looks at the value of a tensor"),
        (with_dropout, (torch.ones(2),), "draws random numbers"),
        (lambda x, n: x * n, (torch.ones(2), 3), "no tensor"),
    ],
)
def test_what_cannot_be_replayed_is_refused(fn: Any, arguments: Any, reason: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(RecordingError, match=reason):
        recorded(fn)(*arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_evolution_is_refused_since_it_draws_its_points() -> None:
    task_loss, meta = problem(sgd(0.1), Evolution(samples=2))
    before = torch.get_rng_state()
    with pytest.raises(RecordingError):
        mean_gradient(task_loss, "vmap", None, recorded)(meta, batch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_with_dropout_is_refused() -> None:
    """A recording would freeze the random state that the recomputation goes back to."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    task_loss, meta = problem(sgd(0.1), "checkpoint", model)
    with pytest.raises(RecordingError, match="random"):
        mean_gradient(task_loss, "loop", None, recorded)(meta, batch(0))


def test_the_compiled_function_agrees() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (y.tanh() * y).sum())(x)

    run = recorded(fn, "inductor")
    for seed in range(2):
        x = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(run(x), fn(x), rtol=1e-12, atol=1e-14)
    hits = counters["inductor"]["fxgraph_cache_hit"]
    recorded(fn, "inductor")(x)
    assert counters["inductor"]["fxgraph_cache_hit"] == hits + 1, "what was compiled is kept"
