"""What a component keeps in Python never stands still in a recording without a word."""

import collections
import itertools
import logging
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metarun.components.backbone.mlp import MLP
from metarun.errors import ConfigError, RunError
from metarun.training.loop import meta_step, validate
from metarun.training.setup import Setup, build
from metarun.training.state import fresh
from metarun.unroll import recorded
from metarun.unroll.effects.python_state import changed, python_state
from tests.conftest import swap_builder
from tests.setups import config_of

TINY = (
    "data=sinusoid", "backbone=mlp", "backbone.hidden=[6]", "trainer.meta_batch=3",
    "trainer.steps=100", "trainer.eval_episodes=20",
)  # fmt: skip


class Plain(nn.Module):
    """The network of the tests, with something in the way of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP((1,), 1, hidden=(6,))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x) * self.scale()
        return result

    def scale(self) -> Any:
        return 1.0


class Counting(Plain):
    calls = 0

    def scale(self) -> float:
        self.calls += 1
        return 1.0


class Annealed(Counting):
    def scale(self) -> float:
        return super().scale() * 0.9**self.calls


class InAClosure(Plain):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def scale() -> float:
            nonlocal calls
            calls += 1
            return 1.0

        self.scale = scale  # type: ignore[method-assign]


COUNT = 0


class InAGlobal(Plain):
    def scale(self) -> float:
        global COUNT
        COUNT += 1
        return 1.0


class InAList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"calls": [0]}

    def scale(self) -> float:
        self.state["calls"][0] += 1
        return 1.0


class AnIterator(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def scale(self) -> float:
        next(self.calls)
        return 1.0


class InAnArray(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [np.zeros(1)]

    def scale(self) -> float:
        self.calls[0][0] += 1
        return 1.0


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class InASlot(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.state = Slotted()

    def scale(self) -> float:
        self.state.calls += 1
        return 1.0


class InADeque(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = collections.deque([0])

    def scale(self) -> float:
        self.calls[0] += 1
        return 1.0


class InASet(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls: set[int] = set()

    def scale(self) -> float:
        self.calls.add(len(self.calls))
        return 1.0


class InASchedule(Plain):
    def __init__(self) -> None:
        super().__init__()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        self.schedule = [torch.optim.lr_scheduler.StepLR(optimizer, 5)]

    def scale(self) -> float:
        self.schedule[0].last_epoch += 1
        return 1.0


class InAnotherModule(Plain):
    def scale(self) -> float:
        own_module.calls += 1  # type: ignore[attr-defined]
        return 1.0


own_module = types.ModuleType("of_the_user")
own_module.__file__ = "of_the_user.py"
own_module.calls = 0  # type: ignore[attr-defined]


class OfItsClass(Plain):
    calls = 0

    def scale(self) -> float:
        type(self).calls += 1
        return 1.0


class SetUpOnce(Plain):
    ready = False

    def scale(self) -> float:
        self.ready = True
        return 1.0


class Switched(Plain):
    """Something outside sets what it multiplies by."""

    factor: Any = 1.0

    def scale(self) -> Any:
        return self.factor


def setup_of(
    monkeypatch: pytest.MonkeyPatch, model: Callable[[], nn.Module], *overrides: str
) -> Setup:
    def builder(shape: Any, outputs: int, **settings: Any) -> nn.Module:
        BUILT[:] = [model()]
        return BUILT[0]

    swap_builder(monkeypatch, "backbone", "mlp", builder)
    return build(config_of(*TINY, *overrides), torch.device("cpu"))


def trained(setup: Setup, steps: int, between: Callable[[int], None] = lambda step: None) -> Any:
    state = fresh(setup)
    for step in range(steps):
        between(step)
        meta_step(setup, state)
    return {name: value.detach() for name, value in state.meta.items()}


BUILT: list[Any] = []


def network() -> Any:
    """The network of the setup that was built last."""
    return BUILT[-1]


def test_annealing_goes_on_under_the_default_recording(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metarun"):
        ours = trained(setup_of(monkeypatch, Annealed), 12)
    assert "meta-steps are not recorded: each call changes Annealed.calls from" in caplog.text
    plain = trained(setup_of(monkeypatch, Annealed, "engine.compile=none"), 12)
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())


COUNTERS = [
    *(Counting, InAClosure, InAGlobal, InAList, AnIterator, OfItsClass),
    *(InAnArray, InASlot, InADeque, InASet, InASchedule, InAnotherModule),
]


@pytest.mark.parametrize("kind", COUNTERS)
def test_a_counter_is_found_wherever_it_is_kept(kind: type[Plain]) -> None:
    net, meta = kind(), {"a": torch.tensor(1.0)}

    def fn(x: Tensor) -> Tensor:
        return meta["a"] * net(x)

    fn(torch.ones(2, 1))
    before = python_state(fn)
    assert changed(before, python_state(fn)) is None
    fn(torch.ones(2, 1))
    found = changed(before, python_state(fn))
    words = (
        "calls from",
        "COUNT from",
        "list",
        "an iterator from",
        "an array",
        "a set",
        "last_epo",
    )
    assert found is not None and any(word in found for word in words)


def test_a_counter_ends_recordings_though_it_matters_to_no_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A threshold that it reaches later would."""
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, Counting), 4)
    assert "not recorded: each call changes Counting.calls from" in caplog.text
    assert "a checkpoint does not hold what is kept in Python" in caplog.text
    with pytest.raises(ConfigError, match=r"each call changes .* use engine\.compile=none"):
        trained(setup_of(monkeypatch, Counting, "engine.compile=replay"), 1)


@pytest.mark.parametrize("kind", COUNTERS)
def test_nothing_that_counts_is_recorded(
    kind: type[Plain], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate that changes every 200 calls would stand still: so would the count, once recorded."""
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, kind), 4)
    assert "meta-steps are not recorded: each call changes" in caplog.text


def test_what_is_not_recorded_tells_of_its_counter_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, Counting, "engine.compile=none"), 4)
    text = "meta-steps change Counting.calls from"
    assert caplog.text.count(text) == 1 and "a checkpoint does not hold what" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, Plain, "engine.compile=none"), 4)
    assert caplog.text == ""


@pytest.mark.parametrize("how", ["auto", "replay"])
def test_what_a_first_call_sets_up_is_no_counter(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, SetUpOnce, f"engine.compile={how}"), 5)
    assert "recorded" not in caplog.text


def switch(net: Any, new: Any) -> Callable[[int], None]:
    def between(step: int) -> None:
        if step == 6:  # the recording has answered at steps 3 to 5
            net.factor = new

    return between


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint"])
@pytest.mark.parametrize("new", [0.5, torch.tensor(0.5)], ids=["a number", "a tensor"])
def test_what_changes_from_outside_is_found_at_a_later_call(
    new: Any, gradient: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Switched, "factor", torch.tensor(1.0) if torch.is_tensor(new) else 1.0)
    setup = setup_of(monkeypatch, Switched, f"engine.gradient={gradient}", "algo.inner_steps=2")
    with caplog.at_level(logging.WARNING, "metarun"):
        trained(setup, 14, switch(network(), new))
    assert "no longer recorded: it gives something else than its recording" in caplog.text
    assert "begin again with engine.compile=none" in caplog.text
    insisted = setup_of(
        monkeypatch, Switched, "engine.compile=replay", f"engine.gradient={gradient}"
    )
    with pytest.raises(RunError, match=r"something else .* use engine\.compile=none"):
        trained(insisted, 14, switch(network(), new))


def test_a_tensor_changed_in_place_is_seen_by_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for how in ("auto", "none"):
        monkeypatch.setattr(Switched, "factor", torch.tensor(1.0))
        setup = setup_of(monkeypatch, Switched, f"engine.compile={how}")
        change = [lambda step: Switched.factor.mul_(0.9 if step > 5 else 1.0)]
        found.append(trained(setup, 12, change[0]))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_validation_has_recordings_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    setup = setup_of(monkeypatch, Switched)
    state, stop = fresh(setup), type("Stop", (), {"check": staticmethod(lambda: None)})()
    tracker = type("Tracker", (), {"metrics": print, "note": print, "elapsed": lambda self: 0.0})()
    for _ in range(20):  # the next comparison by count is at the 33rd
        meta_step(setup, state)
    network().factor = 0.5
    setup.trace, (tmp_path / "checkpoints").mkdir()
    with caplog.at_level(logging.WARNING, "metarun"):
        validate(setup, state, tmp_path / "checkpoints", tracker, stop)
        assert "meta-steps" not in caplog.text
        meta_step(setup, state)
    assert "meta-steps are no longer recorded" in caplog.text


def test_a_value_read_by_python_is_no_constant(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`.tolist()` and `.numpy()` of a traced tensor are silent, other than `.item()`."""

    class Reading(Plain):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x) * (1 + abs(x.tolist()[0][0]))
            return result

    runs = []
    for how in ("auto", "none"):
        setup = setup_of(monkeypatch, Reading, "engine.batching=loop", f"engine.compile={how}")
        with caplog.at_level(logging.INFO, "metarun"):
            runs.append(trained(setup, 6))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert "not recorded" in caplog.text


def test_sizes_that_values_decide_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The derivative of a mean over x[mask] has the number of its terms as a constant."""

    class Masked(Plain):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x)
            return result + result[result > 0].mean()

    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, Masked, "engine.batching=loop"), 4)
    assert "the values of a tensor decide how large a result is" in caplog.text


def test_a_comparison_leaves_random_states_and_constants_alone() -> None:
    total = torch.zeros(())

    def fn(x: Tensor) -> Tensor:
        return x + total.add_(1)

    run = recorded(fn)
    run(torch.ones(()))
    before, start = torch.get_rng_state(), float(total)
    assert [float(run(torch.ones(()))) - start for _ in range(5)] == [2, 3, 4, 5, 6]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_counter_is_found_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup_of(monkeypatch, Annealed, "trainer.steps=5000"), 1)
    assert "compiled meta-steps" not in caplog.text and "each call changes" in caplog.text


def test_a_compiled_program_is_compared_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By its operations, bit by bit: another coefficient is told from rounding however near."""
    setup = setup_of(monkeypatch, Switched, "trainer.steps=5000")
    net = network()
    with caplog.at_level(logging.INFO, "metarun"):
        trained(setup, 6, lambda step: setattr(net, "factor", 1.0 if step < 4 else 1 + 2**-20))
    assert "compiled meta-steps in" in caplog.text
    assert "meta-steps are no longer recorded: it gives something else" in caplog.text
    assert "The 3 calls before" in caplog.text


class Attending(nn.Module):
    """Attention among the examples of a task."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(1, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(1, len(x), 3, 2, 2).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.head(attended.transpose(1, 2).reshape(len(x), 4))
        return result


class Transformer(nn.Module):
    """A layer of torch's, which computes in another way where nothing is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(1, 4), nn.Linear(4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(self.project(x)[None])[0])
        return result


@pytest.mark.parametrize("model", [Attending, Transformer])
@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_attention_without_dropout_draws_nothing(
    batching: str,
    model: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = []
    for how in ("auto", "none"):
        options = (f"engine.compile={how}", f"engine.batching={batching}")
        setup = setup_of(monkeypatch, model, *options)
        with caplog.at_level(logging.INFO, "metarun"):
            values = list(trained(setup, 5).values())
            meta = setup.algorithm.init()
            found.append(
                [
                    *values,
                    *(setup.trace(meta, setup.source.sample("test", s, 2))[0] for s in range(5)),
                ]
            )
    assert all(map(torch.equal, *found))
    assert "recorded" not in caplog.text
