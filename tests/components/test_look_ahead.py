"""Learning while one model trains, against the loop written out in plain torch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.cli.eval import run as evaluate
from metarun.components.algo.base import Trace
from metarun.components.backbone.mlp import MLP
from metarun.components.contract import checked_algorithm
from metarun.config.trained import EvalConfig, EvalData, EvalTask
from metarun.errors import ConfigError
from metarun.training.evaluation import evaluate_split
from metarun.training.loop import meta_step
from metarun.training.setup import Setup
from metarun.training.state import TrainState, fresh
from tests.conftest import Metarun, swap_builder
from tests.setups import setup_of

RUN = (
    "algo=look_ahead", "data=glyphs_examples", "data.classes=4", "backbone=mlp",
    "backbone.hidden=[6]", "algo.batch_size=5", "algo.held_out_batch=7",
)  # fmt: skip
SMALL = (*RUN, "engine.precision=float64", "engine.compile=none")
LR = "inner_opt.learn=[lr]"
ONE_BY_ONE = "inner_opt.granularity=parameter"


def ran(setup: Setup, steps: int) -> TrainState:
    state = fresh(setup)
    for _ in range(steps):
        meta_step(setup, state)
    return state


def leaves(setup: Setup, shift: float = 0.0) -> dict[str, Tensor]:
    """Meta-parameters, of which those that are learned require gradients."""
    generator = torch.Generator().manual_seed(0)
    meta = {name: value.clone() for name, value in setup.algorithm.init().items()}
    for name in meta.keys() - set(setup.algorithm.kept):
        noise = torch.randn(meta[name].shape, generator=generator, dtype=torch.float64)
        meta[name] = (meta[name] + shift * noise).requires_grad_()
    return meta


def window_of(setup: Setup, step: int = 0) -> Any:
    found = setup.train_tasks.sample(step, 1)
    return type(found)(*(value[0] for value in found))


# ---------------------------------------------------------------- the loop written out


class ByHand:
    """Algorithm 1 of Grefenstette et al. 2019 for a small network, with nothing of metarun's.

    SGD with momentum inside, Adam outside; rates of each parameter, and weights of examples.
    """

    def __init__(self, start: dict[str, Tensor], weigh: str, momentum: float) -> None:
        self.weigh, self.momentum = weigh, momentum
        self.params = {n: start[n] for n in start if n.startswith(("body.", "head."))}
        self.buffers = {n: torch.zeros_like(p) for n, p in self.params.items()}
        self.rates = {n: start[f"inner_opt.lr/{n}"].clone().requires_grad_() for n in self.params}
        self.weights: list[Tensor] = []
        if weigh == "examples":
            self.weights = [start["weigh.examples"].clone().requires_grad_()]
        if weigh == "network":
            self.net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double()
            names = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
            for own, name in zip(self.net.parameters(), names, strict=True):
                own.data.copy_(start[f"weigh.{name}"])
            self.weights = list(self.net.parameters())
        self.learned = [*self.rates.values(), *self.weights]
        self.outer = torch.optim.Adam(self.learned, lr=0.01)

    def logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = F.linear(x.flatten(1), params["body.0.weight"], params["body.0.bias"]).relu()
        return F.linear(hidden, params["head.weight"], params["head.bias"])

    def walk(self, window: Any, batches: range, graph: bool) -> tuple[Any, Any]:
        params = {n: p.detach().requires_grad_() for n, p in self.params.items()}
        buffers = {n: b.detach() for n, b in self.buffers.items()}
        for step in batches:
            losses = -self.logits(params, window.x[step]).log_softmax(1)
            losses = losses[range(len(losses)), window.y[step]]
            v = torch.ones_like(losses)
            if self.weigh == "examples":
                v = 2 / (1 + (-self.weights[0][window.number[step]]).exp())
            if self.weigh == "network":
                v = torch.sigmoid(self.net(losses.detach()[:, None]))[:, 0]
            loss = (v * losses).sum() / len(losses)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=graph)
            for (name, p), grad in zip(list(params.items()), grads, strict=True):
                buffers[name] = self.momentum * buffers[name] + grad
                params[name] = p - self.rates[name] * buffers[name]
                if not graph:
                    params[name] = params[name].detach().requires_grad_()
        return params, buffers

    def update(self, window: Any, ahead: int) -> None:
        end, _ = self.walk(window, range(ahead), graph=True)
        loss = F.cross_entropy(self.logits(end, window.held_x), window.held_y)
        grads = torch.autograd.grad(loss, self.learned)
        for value, grad in zip(self.learned, grads, strict=True):
            value.grad = grad
        self.outer.step()

    def advance(self, window: Any, real: int) -> None:
        params, buffers = self.walk(window, range(real), graph=False)
        self.params = {n: p.detach() for n, p in params.items()}
        self.buffers = {n: b.detach() for n, b in buffers.items()}


@pytest.mark.parametrize("weigh", ["none", "network", "examples"])
@pytest.mark.parametrize(("ahead", "real", "updates"), [(1, 1, 1), (3, 2, 1), (2, 1, 3)])
def test_a_run_is_the_loop_written_out(weigh: str, ahead: int, real: int, updates: int) -> None:
    setup = setup_of(
        *SMALL, LR, ONE_BY_ONE, f"algo.weigh={weigh}", "algo.units=3", "outer_opt.lr=0.01",
        f"algo.ahead={ahead}", f"algo.real={real}", f"algo.updates={updates}",
        "inner_opt.momentum=0.5", "inner_opt.lr=0.3",
    )  # fmt: skip
    hand = ByHand(setup.algorithm.init(), weigh, momentum=0.5)
    state = ran(setup, 6)
    for step in range(6):
        window = window_of(setup, step)
        hand.update(window, ahead)
        if (step + 1) % updates == 0:
            hand.advance(window, real)
    for name, p in hand.params.items():
        torch.testing.assert_close(state.meta[name], p, rtol=1e-9, atol=1e-12)
        lr = state.meta[f"inner_opt.lr/{name}"]
        torch.testing.assert_close(lr, hand.rates[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(p, setup.algorithm.init()[name])
    own = [value for name, value in state.meta.items() if name.startswith("weigh.")]
    assert len(own) == len(hand.weights)
    for ours, theirs in zip(own, hand.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_weight_is_that_of_ren_et_al() -> None:
    """∂L/∂vᵢ = −(α/n) ∇L(θ′)·∇ℓᵢ(θ): the agreement of an example with those that are held out."""
    setup = setup_of(*SMALL, "algo.weigh=examples", "inner_opt.lr=0.3")
    meta, window = leaves(setup), window_of(setup)
    value, _ = setup.algorithm.loss(meta, window)
    (found,) = torch.autograd.grad(value, [meta["weigh.examples"]])
    rate = torch.tensor(0.3, dtype=torch.float64)
    hand = ByHand(meta | {f"inner_opt.lr/{name}": rate for name in meta}, "none", momentum=0)

    def gradient(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        own = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(F.cross_entropy(hand.logits(own, x), y), list(own.values()))
        return torch.cat([grad.flatten() for grad in grads])

    end, _ = hand.walk(window, range(1), graph=False)
    at_end = gradient(end, window.held_x, window.held_y)
    expected = torch.zeros_like(found)
    for x, y, number in zip(window.x[0], window.y[0], window.number[0], strict=True):
        agreement = at_end @ gradient(hand.params, x[None], y[None])
        expected[number] += -(0.3 / 5) * agreement * 0.5  # dv/da = 2σ(1 − σ) = 1/2 at a = 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    assert int((found != 0).sum()) == len(set(window.number[0].tolist()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_meta_gradient_is_that_of_finite_differences(optimizer: str) -> None:
    of_all = (LR, ONE_BY_ONE, "algo.weigh=examples", "algo.ahead=3")
    setup = setup_of(*SMALL, f"inner_opt={optimizer}", *of_all)
    ran_for = ran(setup, 2).meta  # the moments are those of a training under way
    window = window_of(setup, 2)
    meta = {name: value.detach().clone() for name, value in ran_for.items()}
    learned = {n: meta[n].requires_grad_() for n in meta.keys() - set(setup.algorithm.kept)}
    value, _ = setup.algorithm.loss(meta, window)
    grads = torch.autograd.grad(value, list(learned.values()), materialize_grads=True)
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(v.shape, generator=generator).double() * 0.1 for v in learned.values()]

    def at(shift: float) -> float:
        moved = {
            n: v.detach() + shift * a for (n, v), a in zip(learned.items(), along, strict=True)
        }
        return float(setup.algorithm.loss({**meta, **moved}, window)[0].detach())

    h = 1e-6
    ours = sum(float((g * a).sum()) for g, a in zip(grads, along, strict=True))
    assert ours == pytest.approx((at(h) - at(-h)) / (2 * h), rel=1e-5, abs=1e-10)
    assert abs(ours) > 1e-7


@pytest.mark.parametrize("mode", ["checkpoint", "mixed", "first_order", "truncated", "evolution"])
def test_other_gradient_modes_are_the_same_gradient_or_an_approximation(mode: str) -> None:
    of_lr = ("algo.ahead=2", LR, "inner_opt.lr=0.5")
    more = ("engine.sigma=0.001", "engine.samples=100") if mode == "evolution" else ()
    found = []
    for gradient in ("reverse", mode):
        setup = setup_of(*SMALL, *of_lr, f"engine.gradient={gradient}", *more)
        torch.manual_seed(0)
        grads, _ = setup.gradient(leaves(setup), setup.train_tasks.sample(0, 1))
        found.append(float(grads["inner_opt.lr"]))
    exact = mode in ("checkpoint", "mixed")
    assert (found[1] == pytest.approx(found[0], rel=1e-9)) == exact
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_moving_averages_are_those_of_torch_and_follow_the_steps_that_are_taken() -> None:
    """Three steps ahead, two steps taken: the layer sees the batches of these two."""
    conv = ("backbone=conv4", "backbone.width=2", "backbone.norm=running", "algo.ahead=3")
    given = [s for s in SMALL if not s.startswith("backbone")] + [*conv, LR, "inner_opt.lr=0.5"]
    one, two = (setup_of(*given, f"algo.real={real}") for real in (1, 2))
    window, layer = window_of(two), nn.BatchNorm2d(2).double()
    after, before = ran(two, 1).meta, two.algorithm.init()
    for step, weights in enumerate((before, ran(one, 1).meta)):
        weight, bias = weights["body.0.conv.weight"], weights["body.0.conv.bias"]
        layer(F.conv2d(window.x[step], weight, bias, stride=2, padding=1))
    torch.testing.assert_close(after["norm.0.mean"], layer.running_mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(after["norm.0.var"], layer.running_var, rtol=1e-9, atol=0)


def test_an_evaluation_takes_the_moving_averages_and_each_example_by_itself() -> None:
    conv = ("backbone=conv4", "backbone.width=2", "backbone.norm=running")
    setup = setup_of(*[s for s in SMALL if not s.startswith("backbone")], *conv, LR)
    meta, batch = ran(setup, 2).meta, setup.source.sample("val", 0, 6)
    together = setup.algorithm.trace(meta, batch)
    for i in range(6):
        alone = setup.algorithm.trace(meta, type(batch)(batch.x[i : i + 1], batch.y[i : i + 1]))
        torch.testing.assert_close(alone.query_loss[0], together.query_loss[i])
    found = evaluate_split(setup, setup.trace, meta, "val", 1, lambda done: None)
    assert found.scores.shape == (8, 1), "all of the part, however many tasks are asked for"
    right = (found.scores[:6, 0] == together.query_score[:, 0]).all()
    assert right and found.summary()["examples"] == 8


def test_a_control_takes_the_same_steps() -> None:
    """With rates that hardly move, a training by the outer optimizer comes to the same."""
    outer = ("outer_opt=sgd", "outer_opt.lr=0.3", "outer_opt.momentum=0.5")
    given = [s for s in SMALL[1:] if not s.startswith("algo.held_out")]
    plain = setup_of("algo=supervised", *given, *outer)
    still = ("outer_opt.lr=1e-300", "inner_opt.lr=0.3", "inner_opt.momentum=0.5")
    ahead = setup_of(*SMALL, LR, *still)
    ours, theirs = ran(ahead, 5).meta, ran(plain, 5).meta
    assert {*theirs} == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "has nothing to learn: give 'inner_opt.learn="),
        ((LR, "inner_opt.schedule=cosine"), r"inner_opt\.schedule: the inner steps of algo=look_"),
        ((LR, "inner_opt.granularity=step"), "granularity=step: .*choose global or parameter"),
        ((LR, "engine.gradient=implicit"), "implicit: a few steps ahead do not end at a minimum"),
        (("algo.weigh=network", "engine.gradient=first_order"), "weigh=network would not be lear"),
        ((LR, "trainer.meta_batch=4"), r"trainer\.meta_batch=4: .* one step after the other"),
        ((LR, "task.way=7"), r"task\.way=7: algo=look_ahead trains one model, and has no tasks"),
        ((LR, "task.train.shot=2"), r"task\.train\.shot=2: algo=look_ahead trains one model"),
        ((LR, "engine.batching=vmap"), r"engine\.batching=vmap: .* no tasks to be computed togeth"),
        ((LR, "engine.chunk=3"), r"engine\.chunk=3: .* no tasks to be computed together"),
        ((LR, "data.classes=5000"), r"data\.classes=5000: there are \d+ classes"),
        ((LR, "data.test=14"), "leaves none to learn from"),
        ((LR, "data=glyphs", "~data.classes"), "data=glyphs_examples or data=omniglot_examples"),
        (("algo=supervised", LR), "algo=supervised has no inner loop; leave inner_opt out"),
        (("algo=supervised", "engine.gradient=mixed"), "algo=supervised has no inner loop to diff"),
        (("algo=maml",), "has labelled examples and no tasks, and algo=maml learns from tasks"),
        (("algo=baseline",), "learns from plain batches of labelled images, which these data do n"),
        (("algo=nearest_neighbour",), "has labelled examples and no tasks"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: tuple[str, ...], message: str) -> None:
    given = ["algo=look_ahead", "data=glyphs_examples", "data.classes=4", "backbone=mlp"]
    for setting in settings:
        key = setting.removeprefix("~").partition("=")[0]
        given = [one for one in given if one.partition("=")[0] != key]
        given += [] if setting.startswith("~") else [setting]
    with pytest.raises(ConfigError, match=message):
        setup_of(*given)


def test_norms_of_support_sets_are_refused() -> None:
    for algo in ("algo=look_ahead", "algo=supervised"):
        for norm in ("support", "support_plus_one"):
            with pytest.raises(ConfigError, match=f"norm={norm}: {algo} has no support sets"):
                setup_of(algo, "data=glyphs_examples", f"backbone.norm={norm}", LR)


class Counting(MLP):
    """A network that counts its calls in a buffer."""

    def __init__(self, inputs: tuple[int, ...], outputs: int, hidden: Any) -> None:
        super().__init__(inputs, outputs, hidden)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


def test_a_network_whose_buffers_the_steps_ahead_would_change_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(shape: tuple[int, ...], outputs: int, **own: Any) -> Counting:
        return Counting(shape, outputs, own["hidden"])

    swap_builder(monkeypatch, "backbone", "mlp", build)
    with pytest.raises(
        ConfigError, match=r"its buffer calls .* the steps ahead of algo=look_ahead"
    ):
        setup_of(*RUN, LR)
    plain = [s for s in RUN[1:] if not s.startswith("algo.held_out")]
    setup = setup_of("algo=supervised", *plain)
    ran(setup, 3)
    assert setup.network.buffers()["calls"] == 3


def test_what_a_plugin_gives_wrongly_is_told() -> None:
    setup = setup_of(*SMALL, LR)
    good, meta, batch = setup.algorithm, leaves(setup), setup.source.sample("val", 0, 3)
    one = good.one_model
    assert one is not None
    for wrong in ({}, {"head.bias": meta["head.bias"]}, None):
        changed = one._replace(advance=lambda meta, given, wrong=wrong: wrong)
        made = checked_algorithm("mine", good._replace(one_model=changed)).one_model
        assert made is not None and made.advance is not None
        with pytest.raises(ConfigError, match=r"mine: advance\(meta, batch\) is .* next values"):
            made.advance(meta, window_of(setup))
    for shape in ((3,), (1, 3), (2, 1)):
        found = Trace(torch.zeros(shape), torch.zeros(shape))
        trace = checked_algorithm("mine", good._replace(trace=lambda *_, f=found: f)).trace
        with pytest.raises(ConfigError, match=r"3 examples it must be a tensor of shape \(3, 1\)"):
            trace(meta, batch)


def test_a_window_beyond_all_memory_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"a meta-step reads .* more than the memory of this m"):
        setup_of(*SMALL, LR, "algo.batch_size=1000000", "algo.ahead=100000")


# ---------------------------------------------------------------- whole runs


def test_a_run_is_evaluated_on_all_examples_of_its_test_part(
    metarun: Metarun, tmp_path: Path
) -> None:
    few = ("trainer.steps=4", "trainer.eval_every=2", "trainer.test_episodes=3")
    noisy = ("data.label_noise=0.5", "algo.weigh=examples", LR, "hydra.run.dir=run")
    done = metarun("train", *RUN, *few, *noisy)
    assert (
        "one model\n4 classes; 40 examples to learn from, 20 with a wrong label, 16" in done.stderr
    )
    assert "without effect: trainer.test_episodes=3 (all examples of its part" in done.stderr
    assert "95 % CI; 16 examples of 4 classes, batch norm: none)" in done.stdout
    assert "40 learned, 4,738 adapted in the inner loop, none frozen; 1 hyperparam" in done.stdout
    assert "next: metarun eval ckpt=run\n" in done.stdout
    test = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    assert len(test["accuracy_per_example"]) == test["examples"] == 16
    assert test["classes"] == 4 and not {"way", "shot", "query", "episodes"} & test.keys()
    assert test["inner_steps"] is None
    again = metarun("eval", "ckpt=run", "hydra.run.dir=again").stdout
    shown = done.stdout.split("test accuracy ")[1].splitlines()[0]
    assert f"test accuracy {shown}" in again
    val = metarun("eval", "ckpt=run", "split=val", "hydra.run.dir=val").stdout
    assert "8 examples of 4 classes" in val
    report = metarun("report", "run").stdout
    assert "glyphs_examples, 4 classes" in report and "16 examples of 1 seed" in report
    for number, (wrong, message) in enumerate(
        (
            ({"task": EvalTask(way=3)}, r"task\.way=3: algo=look_ahead trains one model"),
            (
                {"data": EvalData(name="glyphs")},
                "one classifier on labelled examples, and these data have tasks",
            ),
            ({"episodes": 9}, "episodes=9: the run trained one model, which is evaluated on all"),
            ({"seed": 9}, "seed=9: the run trained one model, which is evaluated on all"),
            ({"more": {"data": {"test": 5}}}, r"data\.test: it says which examples the run has"),
            ({"more": {"data": {"seed": 5}}}, r"data\.seed: it says which examples the run has"),
            ({"more": {"algo": {"ahead": 2}}}, r"algo\.ahead: it is of training alone"),
        )
    ):
        config = EvalConfig(ckpt=str(tmp_path / "run"), device="cpu", **wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            evaluate(config, tmp_path / str(number))
