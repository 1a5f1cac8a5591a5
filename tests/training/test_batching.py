"""`engine.batching=auto` finds out whether vmap can map a network, and loops where it cannot."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.backbone.mlp import MLP
from metarun.errors import ConfigError
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import fresh
from metarun.unroll.advice import UnsuitableModel
from tests.conftest import swap_builder
from tests.setups import config_of

TINY = ("data=sinusoid", "backbone=mlp", "trainer.meta_batch=2", "engine.compile=none")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP((1,), 1, hidden=(6,))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


class Filled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 1)
        h[:] = self.net(x)
        return h


class Numbered(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result * (1 + result.detach().abs().max().item())


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return -result if result.sum() > 0 else result


class Masked(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result + result[x > 0].sum()


class Nonzero(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result + 0.1 * len(torch.nonzero(x > 0))


class Recurrent(Plain):
    """A cell of one's own, which is no `nn.RNNBase` that could be recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        states = x.new_zeros(len(x), 1)
        outputs = torch.zeros(len(x), 1)
        for row in range(len(x)):
            state = torch.tanh(self.cell(torch.cat([x[row], states[row - 1]])))
            outputs[row] = state
        return self.net(x) + outputs


class OneHot(Plain):
    def forward(self, x: Tensor) -> Tensor:
        classes = F.one_hot((x[:, 0] > 0).long())
        result: Tensor = self.net(x) + classes.float().mean(dim=1, keepdim=True)
        return result


class Numpy(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x) * float(x.detach().numpy().max())
        return result


CASES: dict[type[Plain], str] = {
    Filled: "written to in place",
    Numbered: "looks at the value of a tensor",
    Branching: "looks at the value of a tensor",
    Masked: r"decide how large a result is \(x\[mask\], nonzero\)",
    Nonzero: "decide how large a result is",
    Recurrent: "written to in place",
    OneHot: r"torch\.eye\(n\)\[y\]",
}


def setup_of(monkeypatch: pytest.MonkeyPatch, model: Callable[[], nn.Module], *more: str) -> Setup:
    swap_builder(monkeypatch, "backbone", "mlp", lambda shape, outputs, **_: model())
    return build(config_of(*TINY, *more), torch.device("cpu"))


def outcome(setup: Setup) -> list[Tensor]:
    """The parameters after two meta-steps, and the losses of an evaluation."""
    state = fresh(setup)
    for _ in range(2):
        meta_step(setup, state)
    trace = setup.trace(dict(state.meta), setup.source.sample("test", 0, 3))
    return [*(value.detach() for value in state.meta.values()), trace.query_loss]


@pytest.mark.parametrize("kind", CASES)
def test_what_vmap_cannot_map_is_looped_over(
    kind: type[Plain], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metarun"):
        ours = outcome(setup_of(monkeypatch, kind))
    for what in ("meta-steps", "evaluations"):
        assert f"{what} are computed in a loop over tasks, which vmap cannot map:" in caplog.text
    looped = outcome(setup_of(monkeypatch, kind, "engine.batching=loop"))
    assert all(map(torch.equal, ours, looped)), "as if the loop had been asked for"
    insisted = setup_of(monkeypatch, kind, "engine.batching=vmap")
    message = r"engine\.batching=vmap: meta-steps .* by vmap: .*" + CASES[kind]
    with pytest.raises(ConfigError, match=message + r".*; use engine\.batching=auto or loop"):
        outcome(insisted)


def test_numpy_is_refused_in_our_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an inner loss the loop cannot have it either."""
    with pytest.raises(UnsuitableModel, match=r"\.numpy\(\), \.tolist\(\).* Compute with tensors"):
        outcome(setup_of(monkeypatch, Numpy))


@pytest.mark.parametrize("kind", [OneHot, Branching])
def test_a_recording_refuses_in_the_same_words(
    kind: type[Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("engine.batching=loop", "engine.compile=replay")
    with pytest.raises(ConfigError, match=r"looks at the value of a tensor .*F\.one_hot\(y, n\);"):
        outcome(setup_of(monkeypatch, kind, *how))
    how = ("engine.batching=auto", "engine.compile=replay")  # neither vmap nor the loop can be
    with pytest.raises(ConfigError, match=r"compile=replay: .* use engine\.compile=none"):
        outcome(setup_of(monkeypatch, kind, *how))


def test_the_loop_draws_the_random_numbers_that_it_would_have_drawn_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Noisy(Numbered):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.3, self.training))

    ours = outcome(setup_of(monkeypatch, Noisy))
    looped = outcome(setup_of(monkeypatch, Noisy, "engine.batching=loop"))
    assert all(map(torch.equal, ours, looped))


def test_a_mistake_that_a_loop_makes_too_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) @ torch.ones(5, 5)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        outcome(setup_of(monkeypatch, Wrong))


def test_want_of_memory_is_no_reason_for_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the machine, and so would the bits of a resumed run."""

    class Large(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        outcome(setup_of(monkeypatch, Large))
