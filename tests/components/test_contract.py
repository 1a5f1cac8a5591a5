"""What a component gives is checked: each mistake ends in a sentence about it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import at_once
from metarun.components.algo.base import Algorithm, Trace
from metarun.components.algo.maml import maml
from metarun.components.data.sinusoid import Sinusoids
from metarun.episodes.ahead import Ahead
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.training.loop import check_finite, log_recent, meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import fresh, restore, snapshot
from metarun.unroll.advice import UnsuitableModel
from tests.conftest import swap_builder
from tests.setups import config_of

TINY = ("data=sinusoid", "backbone=mlp", "backbone.hidden=[4]", "trainer.meta_batch=2")


def setup_with(
    monkeypatch: pytest.MonkeyPatch, group: str, name: str, builder: Callable[..., Any], *more: str
) -> Setup:
    """The setup of a tiny run in which a plugin has the place of a component of ours."""
    swap_builder(monkeypatch, group, name, builder, is_plugin=True)
    return build(config_of(*TINY, *more), torch.device("cpu"))


# ---------------------------------------------------------------- algorithms


def algorithm(change: Callable[[Algorithm], Any]) -> Callable[..., Any]:
    return lambda problem, **settings: change(maml(problem, **settings))


def with_extra(change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """MAML whose `extra` is changed."""

    def changed(ours: Algorithm) -> Algorithm:
        def loss(meta: Any, episode: Any) -> Any:
            value, extra = ours.loss(meta, episode)
            return value, change(dict(extra))

        return ours._replace(loss=loss)

    return algorithm(changed)


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "a scalar inner loss": (
        with_extra(lambda e: e | {"inner_losses": e["loss"]}),
        r"extra\['inner_losses'\] is a float32 tensor of shape \(\): .* \(inner steps,\), or be",
    ),
    "a float score": (
        with_extra(lambda e: e | {"score": 0.5}),
        r"extra\['score'\] is 0\.5, of type float: it must be a tensor with one number",
    ),
    "a whole number for a score": (
        with_extra(lambda e: e | {"score": torch.tensor(1)}),
        r"extra\['score'\] is a int64 tensor of shape \(\): it must be a floating-point number",
    ),
    "no score": (with_extra(lambda e: {"loss": e["loss"]}), r"gives no extra\['score'\]"),
    "no loss": (with_extra(lambda e: {"score": e["score"]}), r"gives no extra\['loss'\]"),
    "a further key": (with_extra(lambda e: e | {"mine": 1}), r"extra\['mine'\], which nothing"),
    "extra is a list": (with_extra(list), r"it must give \(outer loss, extra\)"),
    "a loss for each query": (
        algorithm(lambda a: a._replace(loss=lambda m, e: (torch.ones(3), a.loss(m, e)[1]))),
        r"the outer loss is a float32 tensor of shape \(3,\): it must be a tensor with one number",
    ),
    "the loss alone": (
        algorithm(lambda a: a._replace(loss=lambda m, e: a.loss(m, e)[0])),
        r"loss\(meta, episode\) gives a float32 tensor .* must give \(outer loss, extra\)",
    ),
}


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_an_outer_loss_without_a_graph_trains_nothing(
    batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in (Tensor.detach, lambda x: torch.ones_like(x)):
        builder = algorithm(
            lambda a, change=change: a._replace(
                loss=lambda m, e: (change(a.loss(m, e)[0]), a.loss(m, e)[1])
            )
        )
        setup = setup_with(monkeypatch, "algo", "maml", builder, f"engine.batching={batching}")
        with pytest.raises(ValueError, match=r"does not depend on what is learned.*detached"):
            meta_step(setup, fresh(setup))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda scores: scores.argmax(1), r"gives \(\d+,\) of torch.int64 for \d+ queries"),
        (lambda scores: scores[:1], "floating-point scores or values of shape"),
        (lambda scores: scores.tolist(), "gives list for"),
    ],
    ids=["labels", "one", "a list"],
)
def test_what_a_predictor_gives_is_checked(
    wrong: Callable[[Tensor], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_it(problem: Any, **_: Any) -> Algorithm:
        def adapt(meta: Any, support: Any) -> Any:
            return lambda x: wrong(x @ meta["w"])

        return at_once(problem, lambda: {"w": torch.ones(1, 1)}, adapt)

    more = ("engine.compile=none", "engine.batching=loop")
    setup = setup_with(monkeypatch, "algo", "maml", build_it, *more)
    with pytest.raises(ConfigError, match=message):
        meta_step(setup, fresh(setup))


def test_a_bias_before_normalisation_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    settings = [
        "data=glyphs",
        "backbone.width=4",
        "trainer.meta_batch=2",
        "engine.precision=float64",
        "engine.compile=none",
    ]
    setup = build(config_of(*settings), torch.device("cpu"))
    meta_step(setup, fresh(setup))
    assert "exactly zero" not in caplog.text


class Detaching(nn.Module):
    """Its body has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).detach())


class Constant(Detaching):
    """Nothing in it has a gradient but zero."""

    def forward(self, x: Tensor) -> Any:
        return 0 * super().forward(x)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (Detaching, "the first meta-gradient of body.weight, body.bias is exactly zero"),
        (Constant, "the first meta-gradient is exactly zero: nothing is learned from such tasks"),
    ],
)
def test_what_has_no_gradient_is_told_at_the_first_step(
    network: type[nn.Module], told: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    setup = setup_with(monkeypatch, "backbone", "mlp", lambda shape, outputs, **_: network())
    state = fresh(setup)
    for _ in range(2):
        meta_step(setup, state)
    assert caplog.text.count("exactly zero") == caplog.text.count(told) == 1


@pytest.mark.parametrize("how", ["auto", "replay"])
@pytest.mark.parametrize("mistake", LOSSES)
def test_what_a_loss_gives_is_checked(
    mistake: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, message = LOSSES[mistake]
    setup = setup_with(monkeypatch, "algo", "maml", builder, f"engine.compile={how}")
    with pytest.raises(ConfigError, match=r"algo=maml: .*" + message):
        meta_step(setup, fresh(setup))


def test_inner_losses_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = with_extra(lambda e: {k: v for k, v in e.items() if k != "inner_losses"})
    setup = setup_with(monkeypatch, "algo", "maml", builder, "engine.compile=none")
    state = fresh(setup)
    meta_step(setup, state)
    assert state.recent[0].inner_losses.shape == (0,)


def test_an_algorithm_logs_numbers_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builder = with_extra(lambda e: e | {"metrics": {"margin": 2 * e["loss"].detach()}})
    setup = setup_with(monkeypatch, "algo", "maml", builder, "engine.compile=none")
    state = fresh(setup)
    for _ in range(2):
        meta_step(setup, state)
    for metrics in state.recent:
        torch.testing.assert_close(metrics.own["margin"], 2 * metrics.loss)
    path = checkpoint.save(tmp_path, snapshot(setup, state), 1, None)
    again = restore(setup, checkpoint.load(path))
    assert [m.own["margin"] for m in again.recent] == [m.own["margin"] for m in state.recent]
    logged: dict[str, float] = {}
    tracker = SimpleNamespace(
        metrics=lambda step, values: logged.update(values),
        show=lambda step, shown: None,
        steps_per_second=lambda: 1.0,
    )
    log_recent(setup, state, tracker)  # type: ignore[arg-type]
    assert logged["train/margin"] == pytest.approx(2 * logged["train/loss"])


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (3, "must be a dict by name"),
        ({"loss": torch.ones(())}, "'loss', which is logged already"),
        ({"margin": torch.ones(2)}, r"metrics'\]\['margin'\] is a .* with one number"),
    ],
)
def test_numbers_that_cannot_be_logged_are_refused(
    monkeypatch: pytest.MonkeyPatch, metrics: Any, words: str
) -> None:
    builder = with_extra(lambda e: e | {"metrics": metrics})
    setup = setup_with(monkeypatch, "algo", "maml", builder, "engine.compile=none")
    with pytest.raises(ConfigError, match=words):
        meta_step(setup, fresh(setup))


TRACES: dict[str, tuple[Any, str]] = {
    "no dimension": (Trace(torch.ones(()), torch.ones(())), r"query_loss is a .* shape \(\): .*1,"),
    "nothing": (Trace(torch.ones(0), torch.ones(0)), r"query_loss is a .* shape \(0,\)"),
    "different lengths": (Trace(torch.ones(2), torch.ones(3)), "has 2 values and query_score 3"),
    "numbers": (Trace(1.0, 2.0), "query_loss is 1.0, of type float"),  # type: ignore[arg-type]
    "a pair": (
        (torch.ones(1), torch.ones(1)),
        r"must give a Trace of metarun\.components\.algo\.base",
    ),
}


@pytest.mark.parametrize("mistake", TRACES)
def test_what_a_trace_gives_is_checked(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, message = TRACES[mistake]
    builder = algorithm(lambda a: a._replace(trace=lambda m, e: found))
    setup = setup_with(monkeypatch, "algo", "maml", builder)
    with pytest.raises(ConfigError, match=r"algo=maml: trace\(meta, episode\).*" + message):
        setup.trace(setup.algorithm.init(), setup.source.sample("test", 0, 2))


def test_a_source_that_fails_later_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Sinusoids):
        def sample(self, split: str, start: int, count: int) -> Any:
            if start >= 4:
                return 1 / 0 if split == "train" else None
            return super().sample(split, start, count)

    def build_it(task: Any, seed: int, device: Any, dtype: Any, **_: Any) -> Any:
        return Failing(shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)

    setup = setup_with(monkeypatch, "data", "sinusoid", build_it)
    with pytest.raises(ConfigError, match=r"sample\('train', 4, .*ZeroDivisionError"):
        setup.source.sample("train", 4, 2)
    with pytest.raises(ConfigError, match=r"sample\('val', 4, 2\) gives None, .*no episodes"):
        setup.source.sample("val", 4, 2)


def test_an_algorithm_is_one_and_begins_with_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"algo=maml builds .*of type tuple: it must build"):
        setup_with(monkeypatch, "algo", "maml", algorithm(tuple))
    wrong = r"init\(\) gives .* floating-point tensors by name"
    for meta, message in (
        ({}, "has nothing to learn"),
        ({"a": torch.tensor(1)}, wrong),
        ({"a": 1.0}, wrong),
        ([torch.ones(1)], wrong),
    ):
        builder = algorithm(lambda a, meta=meta: a._replace(init=lambda: meta))
        with pytest.raises(ConfigError, match=message):
            setup_with(monkeypatch, "algo", "maml", builder)


# ---------------------------------------------------------------- networks and optimizers


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: 3, r"builds 3, of type int: it must build an nn\.Module"),
        (lambda: nn.ReLU(), "has no parameters"),
        (lambda: nn.Linear(1, 2), r"of shape \(10, 2\) for 10 examples: .* shape \(10, 1\)"),
        (
            lambda: nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)),
            r"of shape \(10,\) for 10 examples",  # which a mean squared error would broadcast
        ),
    ],
    ids=["no module", "no parameters", "two outputs", "no dimension of outputs"],
)
def test_a_network_is_checked(
    network: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"backbone=mlp .*" + message):
        setup_with(monkeypatch, "backbone", "mlp", lambda shape, outputs, **_: network())


class InFloat32(nn.Linear):
    """A network that meets its input, of whatever type, with a tensor of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.ones(len(x), 1, dtype=torch.float32)) + x


def test_a_network_that_mixes_types_is_told_how_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def builder(shape: Any, outputs: int, **_: Any) -> nn.Module:
        return InFloat32(1, 1)

    setup_with(monkeypatch, "backbone", "mlp", builder)
    with pytest.raises(UnsuitableModel, match=r"mixes tensors of two types.*dtype=x\.dtype"):
        setup_with(monkeypatch, "backbone", "mlp", builder, "engine.precision=float64")


def test_checking_a_network_leaves_it_and_the_random_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)
            return super().forward(x)

    made: list[Odd] = []

    def builder(shape: Any, outputs: int, **_: Any) -> nn.Module:
        made.append(Odd(1, 1))
        return made[-1]

    setup_with(monkeypatch, "backbone", "mlp", builder)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    Odd(1, 1)
    assert made[-1].calls == 0 and torch.equal(torch.get_rng_state(), state)


def test_optimizers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"inner_opt=sgd builds .*InnerOptimizer or LossOpt"):
        setup_with(monkeypatch, "inner_opt", "sgd", lambda **settings: torch.optim.SGD)
    monkeypatch.undo()
    setup = setup_with(monkeypatch, "outer_opt", "adam", lambda params, **settings: "adam")
    with pytest.raises(ConfigError, match=r"outer_opt=adam builds 'adam'.* torch\.optim\.Opt"):
        fresh(setup)


# ---------------------------------------------------------------- data


class Labelled(Sinusoids):
    """A classification in two classes, by the sign of y."""

    kind = "classification"
    outputs = 2

    def sample(self, split: str, start: int, count: int) -> Any:
        drawn = super().sample(split, start, count)
        return Episodes(*(p if n % 2 == 0 else (p[..., 0] > 0).long() for n, p in enumerate(drawn)))


def source(
    change: Callable[[Any], Any] = lambda episodes: episodes,
    kind: type[Sinusoids] = Sinusoids,
    **attributes: Any,
) -> Callable[..., Any]:
    """Sine curves with other episodes or attributes."""

    class Changed(kind):  # type: ignore[misc, valid-type]
        def sample(self, split: str, start: int, count: int) -> Any:
            return change(super().sample(split, start, count))

    def builder(task: Any, seed: int, device: Any, dtype: Any) -> Any:
        shape = {"shot": task.shot, "query": task.query}
        made = Changed(**shape, seed=seed, device=device, dtype=dtype)
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    return builder


@dataclass
class Bare:
    kind: str = "regression"
    outputs: int = 1


def stateful() -> Callable[..., Any]:
    drawn: list[int] = []

    def change(episodes: Episodes) -> Episodes:
        drawn.append(1)
        return episodes._replace(query_y=episodes.query_y + len(drawn))

    return source(change)


def random(episodes: Episodes) -> Episodes:
    return episodes._replace(query_x=torch.rand_like(episodes.query_x))


SOURCES: dict[str, tuple[Callable[..., Any], str]] = {
    "no shape": (lambda *_: Bare(), "without `input_shape`"),
    "an unknown kind": (
        lambda *a: _with(source()(*a), kind="ranking"),
        "is of kind 'ranking': classification or regression",
    ),
    "outputs": (source(outputs=2.0), r"outputs=2\.0: must be 1 or more"),
    "a shape": (source(input_shape=1), r"input_shape=1: must be a tuple"),
    "an identity": (source(identity=3), "identity=3, of type int: must be a text"),
    "a list": (source(list), "a value of type list: it must give metarun.episodes.source.Episodes"),
    "a plain tuple": (source(tuple), "or a NamedTuple that begins with support_x"),
    "fewer tasks": (
        source(lambda e: Episodes(*(part[:1] for part in e))),
        r"sample\('train', 0, 2\): support_x is a .* with 2 tasks as its first dimension",
    ),
    "another dtype": (
        source(lambda e: e._replace(query_y=e.query_y.double())),
        r"query_y is a float64 tensor .* dtype, torch\.float32",
    ),
    "another shape": (
        source(lambda e: e._replace(support_x=e.support_x[..., 0])),
        r"support_x is .*input_shape is \(1,\)",
    ),
    "targets without outputs": (
        source(lambda e: e._replace(query_y=e.query_y[..., 0])),
        r"query_y is .* of shape \(tasks, 10, 1\)",
    ),
    "labels of a regression": (
        source(lambda e: e._replace(query_y=e.query_y.long())),
        "targets must be floating-point numbers",
    ),
    "labels that are floats": (
        source(lambda e: e._replace(query_y=e.query_y.float()), Labelled),
        "labels must be int64",
    ),
    "labels out of range": (
        source(lambda e: e._replace(support_y=e.support_y + 4), Labelled),
        r"support_y has labels from 4 to 5, but outputs=2: labels go from 0 to 1",
    ),
    "a number": (source(lambda e: e._replace(query_x=1)), r"query_x is 1, of type int"),
    "an episode by its count": (stateful(), "is another one when it is drawn again"),
    "random numbers": (source(random), "is another one when it is drawn again"),
}


def _with(made: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("mistake", SOURCES)
def test_a_source_of_episodes_is_checked(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, message = SOURCES[mistake]
    with pytest.raises(ConfigError, match=r"data=sinusoid.*" + message):
        setup_with(monkeypatch, "data", "sinusoid", builder)


def test_a_split_that_is_missing_is_missed_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(Sinusoids):
        def sample(self, split: str, start: int, count: int) -> Episodes:
            return super().sample({"train": "train", "val": "val"}[split], start, count)

    def builder(task: Any, seed: int, device: Any, dtype: Any) -> Any:
        return Split(shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)

    with pytest.raises(ConfigError, match=r"sample\('test', 0, 2\) ends in KeyError: 'test'; .*"):
        setup_with(monkeypatch, "data", "sinusoid", builder)


class Weighted(NamedTuple):
    """An episode with a field more than usual."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    weights: Tensor


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_an_episode_may_have_more_fields(batching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = source(lambda e: Weighted(*e, weights=torch.ones(len(e.query_x), 10)))
    how = (f"engine.batching={batching}", "engine.compile=replay")
    setup = setup_with(monkeypatch, "data", "sinusoid", builder, *how)
    meta_step(setup, fresh(setup))
    ahead: Any = Ahead(setup.source, "train")
    assert [ahead.sample(start, 2).weights.shape for start in (0, 2)] == [(2, 10)] * 2


@pytest.mark.parametrize("follows", [True, False])
def test_a_loss_takes_what_its_algorithm_says(
    monkeypatch: pytest.MonkeyPatch, follows: bool
) -> None:
    def changed(ours: Algorithm) -> Algorithm:
        if follows:
            return ours._replace(loss=lambda meta, task: ours.loss(meta, task), follows_step=True)
        return ours._replace(loss=lambda meta, task, step: ours.loss(meta, task))

    with pytest.raises(ConfigError, match=r"its loss must take \(meta, episode"):
        setup_with(monkeypatch, "algo", "maml", algorithm(changed), "engine.compile=none")


def test_a_number_of_its_own_may_be_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = with_extra(lambda e: e | {"metrics": {"margin": e["loss"].detach() * float("nan")}})
    setup = setup_with(monkeypatch, "algo", "maml", builder, "engine.compile=none")
    state = fresh(setup)
    meta_step(setup, state)
    check_finite(state)
