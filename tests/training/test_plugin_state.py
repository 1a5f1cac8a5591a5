"""What a plugin's network has besides learned parameters: buffers, frozen weights, halves."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem, detached_parameters
from metarun.components.algo.halves import halves
from metarun.components.algo.maml import maml
from metarun.episodes.source import Episodes
from metarun.errors import CheckpointError, ConfigError, RunError
from metarun.rundir import checkpoint
from metarun.system.ranks import Ranks
from metarun.training.loop import meta_step, save, validate
from metarun.training.metrics import stacked
from metarun.training.setup import Setup, build
from metarun.training.state import fresh, restore, restore_meta, snapshot
from metarun.unroll import sgd
from metarun.unroll._torch import pytree
from tests.conftest import Metarun, swap_builder
from tests.setups import config_of

CPU = torch.device("cpu")
TINY = ("data=sinusoid", "trainer.meta_batch=3", "trainer.steps=12", "trainer.test_episodes=4")
LOOPED = ("loop", "none", "none", 1)

NETS = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from metarun.components import register

@dataclass
class SpectralConfig:
    name: str = "spectral"

@dataclass
class ProjectedConfig:
    name: str = "projected"

@dataclass
class HalfFrozenConfig:
    name: str = "half_frozen"

class Net(nn.Module):
    def __init__(self, body, outputs):
        super().__init__()
        self.body, self.head = body, nn.Linear(6, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(1, 6), persistent=False)
        self.plain = torch.randn(6)  # a tensor that torch knows nothing of

    def forward(self, x):
        return x @ self.matrix + self.plain

def spectral(shape, outputs):
    return Net(nn.Sequential(nn.Linear(1, 6), spectral_norm(nn.Linear(6, 6))), outputs)

def half_frozen(shape, outputs):
    return Net(nn.Linear(1, 6).requires_grad_(False), outputs)

register("backbone", "spectral", SpectralConfig, spectral)
register("backbone", "projected", ProjectedConfig, lambda s, outputs: Net(Projection(), outputs))
register("backbone", "half_frozen", HalfFrozenConfig, half_frozen)
"""
RUN = (
    "train", "+plugins=[nets]", *TINY, "trainer.eval_every=4", "trainer.checkpoint_every=4",
    "trainer.eval_episodes=4", "trainer.keep_every=4",
)  # fmt: skip


class Net(nn.Module):
    """A body and a head, with something in between."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.between, self.head = nn.Linear(1, 6), between or nn.Tanh(), nn.Linear(6, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.features(x)))


class Running(nn.Module):
    """A mean over calls, in evaluation as well if `always`."""

    mean: Tensor
    calls: Tensor

    def __init__(self, always: bool = False, detach: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0), persistent=False)
        self.register_buffer("last", None)
        self.always, self.detaches, self.in_place = always, detach, in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            seen = (x.detach() if self.detaches else x).mean(0)
            if self.in_place:
                self.mean.mul_(0.9)
            self.mean = 0.9 * self.mean + 0.1 * seen
            self.calls, self.last = self.calls + 1, x.detach()
        return x - self.mean


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setup]:
    def make(model: Callable[[], nn.Module], *overrides: str, **options: Any) -> Setup:
        monkeypatch.setattr("metarun.training.setup.build_model", lambda *_, **__: model())
        return build(config_of(*TINY, "backbone=mlp", *overrides), CPU, **options)

    return make


def spectral() -> nn.Module:
    return Net(nn.Sequential(spectral_norm(nn.Linear(6, 6)), nn.Dropout(0.2)))


# --- buffers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["spectral", "projected", "half_frozen"])
def test_eval_repeats_a_run_and_another_seed_changes_the_tasks_only(
    metarun: Metarun, tmp_path: Path, backbone: str
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    metarun(*RUN, f"backbone={backbone}", "hydra.run.dir=run")

    def figures(*arguments: str, folder: str) -> Any:
        metarun("eval", "+plugins=[nets]", "ckpt=run", *arguments, f"hydra.run.dir={folder}")
        return json.loads((tmp_path / folder / "result.json").read_text())["test"]

    same = figures(folder="same")
    assert same == json.loads((tmp_path / "run/result.json").read_text())["test"]
    content = checkpoint.load(tmp_path / "run/checkpoints/best.safetensors")
    other = figures("seed=7", folder="other")
    assert other["seed"] == 7 and other["mse"] != same["mse"]
    # The other tasks by hand: the run's own network on the episodes of seed 7.
    assert other["mse"] == by_hand(tmp_path, content, seed=7)


def by_hand(folder: Path, content: dict[str, Any], seed: int) -> float:
    space: dict[str, Any] = {}
    exec(NETS.partition("register(")[0], space)
    torch.manual_seed(content["config"]["seed"])
    model = space[content["config"]["backbone"]["name"]]((1,), 1) if (
        content["config"]["backbone"]["name"] != "projected"
    ) else space["Net"](space["Projection"](), 1)  # fmt: skip
    state = content["meta"] | content.get("frozen", {}) | content.get("buffers", {})
    config = config_of(*TINY, "backbone=mlp", f"seed={seed}")
    tasks = build(config, CPU).source.sample("test", 0, 4)
    model.eval()
    errors = []
    for sx, sy, qx, qy in zip(*tasks, strict=True):
        fast = {name: state[name].clone().requires_grad_() for name in content["meta"]}
        for _ in range(config.algo.eval_inner_steps):
            outputs = torch.func.functional_call(model, state | fast, (sx,))
            grads = torch.autograd.grad((outputs - sy).pow(2).mean(), list(fast.values()))
            steps = zip(fast.items(), grads, strict=True)
            lr = content["config"]["inner_opt"]["lr"]
            fast = {n: (p - lr * g).detach().requires_grad_() for (n, p), g in steps}
        outputs = torch.func.functional_call(model, state | fast, (qx,))
        errors.append((outputs - qy).pow(2).mean().double())
    return pytest.approx(float(torch.stack(errors).mean().detach()), rel=1e-5)


@pytest.mark.parametrize("backbone", ["spectral", "projected", "half_frozen"])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    metarun: Metarun, tmp_path: Path, backbone: str
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    folder = tmp_path / "run" / "checkpoints"
    found = []
    for attempt in range(2):
        done = metarun(*RUN, f"backbone={backbone}", "hydra.run.dir=run")
        found.append(checkpoint.load(folder / "last.safetensors"))
        if attempt == 0:  # as if it had been killed after meta-step 4
            (folder / "step-00000004.safetensors").replace(folder / "last.safetensors")
            for later in (
                "step-00000008.safetensors",
                "step-00000012.safetensors",
                "best.safetensors",
            ):
                (folder / later).unlink()
            (tmp_path / "run" / "status.json").unlink()
    assert "resuming after meta-step 4" in done.stderr
    for part in {"meta", "buffers", "frozen"} & found[0].keys():
        assert found[0][part].keys() == found[1][part].keys()
        for name, value in found[0][part].items():
            assert torch.equal(found[1][part][name], value), name
    assert found[0]["frozen" if backbone == "half_frozen" else "buffers"]


def test_training_changes_buffers_task_by_task_as_plain_torch_does(
    built: Callable[..., Setup],
) -> None:
    setup = built(lambda: Net(Running()).double(), "engine.precision=float64", "inner_opt.lr=0.1")
    torch.manual_seed(0)
    assert tuple(setup.plan[i] for i in (0, 2, 3, 5)) == LOOPED
    state = fresh(setup)
    oracle = Net(Running()).double()
    oracle.load_state_dict(state.meta, strict=False)
    for step in range(2):
        tasks = setup.source.sample("train", 3 * step, 3)
        oracle.load_state_dict({k: v.detach() for k, v in state.meta.items()}, strict=False)
        meta_step(setup, state)
        for sx, sy, qx, _ in zip(*tasks, strict=True):
            start = dict(oracle.named_parameters())
            loss = (oracle(sx) - sy).pow(2).mean()
            grads = torch.autograd.grad(loss, list(start.values()))
            fast = {n: p - 0.1 * g for (n, p), g in zip(start.items(), grads, strict=True)}
            torch.func.functional_call(oracle, fast, (qx,))
        buffers = setup.network.buffers()
        assert buffers["between.calls"] == oracle.between.calls == 6 * (step + 1)
        torch.testing.assert_close(
            buffers["between.mean"], oracle.between.mean.detach(), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("model", [spectral, lambda: Net(Running()), lambda: Net(Running(True))])
def test_a_state_goes_on_from_its_checkpoint_with_the_same_bits(
    built: Callable[..., Setup], model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    setup = built(model)
    state = fresh(setup)
    for _ in range(2):
        meta_step(setup, state)
    path = checkpoint.save(tmp_path, snapshot(setup, state), 3, None)
    other = built(model)
    again = restore(other, checkpoint.load(path))
    for each, its in ((setup, state), (other, again)):
        torch.manual_seed(4)  # of dropout
        for _ in range(2):
            meta_step(each, its)
    for name, value in snapshot(setup, state)["buffers"].items():
        assert torch.equal(snapshot(other, again)["buffers"][name], value), name


@pytest.mark.parametrize("always", [False, True])
def test_evaluation_changes_no_buffer_and_each_task_begins_with_the_same(
    built: Callable[..., Setup], always: bool
) -> None:
    setup = built(lambda: Net(Running(always)))
    state = fresh(setup)
    meta_step(setup, state)
    before = setup.network.buffers()
    tasks = setup.source.sample("val", 0, 3)
    together = setup.trace(state.meta, tasks)
    last = setup.trace(state.meta, type(tasks)(*(part[2:] for part in tasks)))
    assert torch.equal(together.query_loss[2:], last.query_loss)
    after = setup.network.buffers()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_skipped_meta_step_leaves_the_buffers(built: Callable[..., Setup]) -> None:
    setup = built(lambda: Net(Running()), "trainer.nonfinite=skip")
    state = fresh(setup)
    meta_step(setup, state)
    before = setup.network.buffers()
    with torch.no_grad():
        state.meta["head.bias"].fill_(float("nan"))
    meta_step(setup, state)
    assert state.skipped == 1 and before["between.calls"] == 6
    after = setup.network.buffers()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("engine.batching=vmap", r"use engine\.batching=loop"),
        ("engine.compile=replay", r"use engine\.compile=none"),
        ("engine.compile=inductor", r"use engine\.compile=none"),
        ("engine.gradient=checkpoint", r"use engine\.gradient=reverse"),
        ("engine.gradient=mixed", r"use engine\.gradient=reverse"),
        ("engine.gradient=implicit", r"use engine\.gradient=reverse"),
        ("engine.gradient=evolution", r"use engine\.gradient=reverse"),
        ("inner_opt=newton", r"use inner_opt=sgd"),
    ],
)
def test_what_changing_buffers_rule_out_is_refused_before_the_run(
    built: Callable[..., Setup], setting: str, advice: str
) -> None:
    message = rf"{setting}: the backbone changes its buffer between\.\S+ when .*{advice}"
    with pytest.raises(ConfigError, match=message):
        built(spectral, setting)
    built(lambda: Net(Running()), setting, trained_with=0)  # evaluation leaves them alone


def test_ranks_and_graphs_and_changes_in_place_are_refused(built: Callable[..., Setup]) -> None:
    with pytest.raises(ConfigError, match="start one process"):
        built(spectral, ranks=Ranks(0, 2))
    with pytest.raises(ConfigError, match=r"buffer between\.mean what still has its graph.*detach"):
        built(lambda: Net(Running(detach=False)))
    with pytest.raises(ConfigError, match=r"in place.*assign a new value"):
        built(lambda: Net(Running(in_place=True)))


@pytest.mark.parametrize(
    ("batching", "how"),
    [("vmap", "none"), ("vmap", "replay"), ("loop", "replay"), ("vmap", "inductor")],
)
def test_constant_buffers_and_frozen_weights_are_as_good_as_written_out(
    built: Callable[..., Setup], how: str, batching: str
) -> None:
    class Written(Net):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.register_buffer("matrix", torch.randn(6, 6))
            self.register_buffer("allowed", torch.tensor([True, False, True] * 2))
            self.register_buffer("turn", torch.tensor([1j, 1.0]))
            self.register_buffer("all_alike", torch.ones(1).expand(6))
            self.body.weight.requires_grad_(False)

        def features(self, x: Tensor) -> Tensor:
            z = torch.where(self.allowed, super().features(x) @ self.matrix, self.all_alike)
            return z if how == "inductor" else z * self.turn.imag.sum()  # it warns of complex ones

    settings = ("engine.precision=float64", f"engine.batching={batching}", "algo.inner_steps=2")
    plain = built(lambda: Written().double(), *settings, "engine.compile=none")
    other = built(lambda: Written().double(), *settings, f"engine.compile={how}")
    rows = []
    for setup in (plain, other):
        state = fresh(setup)
        for _ in range(3):
            meta_step(setup, state)
        assert "body.weight" not in state.meta
        rows.append(pytree.tree_leaves(stacked(state.recent)))
        content = snapshot(setup, state)
        assert set(content["buffers"]) == {"matrix", "allowed", "turn", "all_alike"}
        torch.manual_seed(5)
        again = built(lambda: Written().double(), *settings)
        with torch.no_grad():
            again.network.put({n: torch.zeros_like(b) for n, b in content["buffers"].items()})
            again.network.frozen["body.weight"].zero_()
        restore(again, content)
        for part in ("buffers", "frozen"):
            for name, value in snapshot(again, state)[part].items():
                assert torch.equal(value, content[part][name]), name
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-10, atol=0)


def test_a_look_at_the_buffers_changes_no_bits(built: Callable[..., Setup]) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(Running())
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(F.dropout(x, 0.1))

    torch.manual_seed(0)
    models = [Counting()]
    state = torch.get_rng_state()
    setup = built(lambda: (torch.set_rng_state(state), models[0])[1])
    assert models[0].count == 0 and torch.equal(torch.get_rng_state(), state)
    assert models[0].training and setup.network.buffers()["between.calls"] == 0
    assert "between.last" not in setup.network.buffers()


def test_a_buffer_that_changes_later_stops_the_run(
    built: Callable[..., Setup], tmp_path: Path
) -> None:
    setup = built(lambda: Net(Running(True)))
    setup.network.changing = ()
    setup.network.put(setup.network.buffers())
    state = fresh(setup)
    meta_step(setup, state)
    for act in (save, validate):
        with pytest.raises(RunError, match=r"changed its buffer between\.mean by meta-step 1"):
            act(setup, state, tmp_path, *[None] * (act.__code__.co_argcount - 3))  # type: ignore


def test_a_checkpoint_with_other_buffers_is_refused(built: Callable[..., Setup]) -> None:
    def frozen_body() -> nn.Module:
        net = Net()
        net.register_buffer("fixed", torch.ones(2))
        net.body.weight.requires_grad_(False)
        return net

    setup = built(frozen_body)
    content = snapshot(setup, fresh(setup))
    for part, name in (("buffers", "fixed"), ("frozen", "body.weight")):
        with pytest.raises(CheckpointError, match=rf"{name} is float32 \(3,\) there and"):
            restore_meta(setup, content | {part: {name: torch.ones(3)}})
        with pytest.raises(CheckpointError, match=f"{name} is not there and float32"):
            restore_meta(setup, content | {part: {}})


class Unlearned(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "list":
            self.layers = [nn.Linear(2, 2)]
        elif kind == "tensor":
            self.scale = torch.ones(1, requires_grad=True)
        elif kind == "buffer":
            self.register_buffer("scale", torch.ones(1, requires_grad=True))
        elif kind == "sparse":
            self.register_buffer("mask", torch.eye(3).to_sparse())
        elif kind == "lazy":
            self.more = nn.LazyLinear(3)
        else:
            self.requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("list", "layers of the backbone requires gradients.*nn.ModuleList"),
        ("tensor", "scale of the backbone requires gradients.*nn.Parameter"),
        ("buffer", "buffer scale of the backbone requires gradients.*nn.Parameter"),
        ("sparse", "mask of the backbone has .*checkpoints cannot hold"),
        ("lazy", "more.weight of the backbone has no size"),
        ("frozen", "no parameter that could be learned"),
    ],
)
def test_what_would_be_lost_or_never_learned_is_refused(
    built: Callable[..., Setup], kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        built(lambda: Unlearned(kind))


# --- frozen weights --------------------------------------------------------------------------


def frozen_body() -> nn.Module:
    net = Net()
    net.body.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("algo=anil",),
        ("inner_opt.weight_decay=0.5", "outer_opt=adamw", "outer_opt.weight_decay=0.5"),
        ("inner_opt.learn=[lr]", "inner_opt.granularity=parameter"),
        ("engine.batching=loop", "engine.gradient=mixed", "algo.inner_steps=2"),
        ("engine.batching=loop", "engine.gradient=checkpoint", "algo.inner_steps=2"),
        ("engine.batching=loop", "engine.gradient=implicit"),
        ("algo.order=1", "engine.compile=replay"),
    ],
    ids=" ".join,
)
def test_frozen_is_frozen(built: Callable[..., Setup], settings: tuple[str, ...]) -> None:
    models: list[nn.Module] = []
    setup = built(lambda: models.append(frozen_body()) or models[-1], *settings)
    start = [p.clone() for p in models[0].body.parameters()]
    state = fresh(setup)
    for _ in range(3):
        meta_step(setup, state)
    assert not any(name.endswith(("body.weight", "body.bias")) for name in state.meta)
    assert all(map(torch.equal, models[0].body.parameters(), start))
    rates = sum(p.numel() for name, p in state.meta.items() if name.startswith("inner_opt."))
    assert (rates > 0) == ("inner_opt.learn=[lr]" in settings)
    counts = {"learned": 7, "hyperparameters": rates, "adapted": 7, "frozen": 12}
    assert setup.parameters == counts
    assert torch.equal(snapshot(setup, state)["frozen"]["body.bias"], start[1])


def test_frozen_weights_are_constants_of_both_loops_in_float64(
    built: Callable[..., Setup],
) -> None:
    setup = built(lambda: frozen_body().double(), "engine.precision=float64", "inner_opt.lr=0.1")
    meta = fresh(setup).meta
    task = setup.source.sample("train", 0, 1)
    grads, _ = setup.gradient(meta, task)
    model = frozen_body().double()
    values = {k: v.detach().requires_grad_() for k, v in meta.items()}
    sx, sy, qx, qy = (part[0] for part in task)
    state = values | setup.network.frozen_values()
    loss = (torch.func.functional_call(model, state, (sx,)) - sy).pow(2).mean()
    inner = torch.autograd.grad(loss, list(values.values()), create_graph=True)
    fast = {n: p - 0.1 * g for (n, p), g in zip(values.items(), inner, strict=True)}
    outer = (torch.func.functional_call(model, state | fast, (qx,)) - qy).pow(2).mean()
    expected = torch.autograd.grad(outer, list(values.values()))
    for name, value in zip(values, expected, strict=True):
        torch.testing.assert_close(grads[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "setting",
    [
        "algo.adapt=[body.*]",
        "algo.adapt=[head.*,body.weight]",
        "inner_opt.groups=[{params:body.*,lr:0.1}]",
        "inner_opt=partition "
        "inner_opt.parts=[{params:body.*,name:sgd},{params:head.*,name:newton}]",
    ],
)
def test_patterns_that_name_frozen_weights_only_are_refused(
    built: Callable[..., Setup], setting: str
) -> None:
    message = r"'body\.\S+' names only parameters that the backbone has frozen .*not frozen are: he"
    with pytest.raises(ConfigError, match=setting.split("=")[-3 if " " in setting else 0][-4:]):
        built(frozen_body, *setting.split())
    with pytest.raises(ConfigError, match=message):
        built(frozen_body, *setting.split())


def test_an_algorithm_that_learns_frozen_weights_is_refused(
    built: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(problem: Problem, **settings: Any) -> Any:
        ours = maml(problem)
        every = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        return ours._replace(init=lambda: every)

    swap_builder(monkeypatch, "algo", "maml", greedy)
    with pytest.raises(ConfigError, match=r"learns body\.weight, .* frozen.*detached_parameters"):
        built(frozen_body)


def test_the_summary_says_how_many_are_learned_adapted_and_frozen(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    done = metarun(*RUN, "backbone=half_frozen", "hydra.run.dir=run")
    assert "parameters: 7 learned, 7 adapted in the inner loop, 12 frozen" in done.stdout
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["parameters"] == {"learned": 7, "hyperparameters": 0, "adapted": 7, "frozen": 12}
    whole = metarun("train", *TINY, "algo=anil", "backbone=mlp", "trainer.steps=2")
    assert "parameters: 1,761 learned, 41 adapted in the inner loop, none frozen" in whole.stdout
    rates = metarun("train", *TINY, "backbone=mlp", "inner_opt.learn=[lr]", "trainer.steps=2")
    assert "none frozen; 1 hyperparameter learned" in rates.stdout


def test_a_part_in_evaluation_mode_stays_in_it(built: Callable[..., Setup]) -> None:
    net = Net(nn.Dropout(0.5))
    net.between.eval()
    setup = built(lambda: net)
    setup.trace(fresh(setup).meta, setup.source.sample("val", 0, 1))
    assert net.training and not net.between.training


# --- features and head -----------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        if learned:
            self.factor = nn.Parameter(torch.ones(1))
        else:
            self.register_buffer("factor", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Variant(Net):
    """A network whose features and head are not the whole of it, or not by themselves."""

    def __init__(self, kind: str) -> None:
        super().__init__(nn.Identity())
        self.kind = kind
        if kind == "tied":
            self.body = nn.Linear(1, 1)
            self.head = nn.Linear(1, 1)
            self.head.weight = self.body.weight
        if kind == "head of the body":
            self.head = nn.Linear(6, 6)

    def features(self, x: Tensor, *more: Tensor) -> Tensor:
        if self.kind == "head of the body":
            return super().features(x) @ self.head.weight
        if self.kind == "more arguments":
            return super().features(x) + more[0]
        return super().features(x)

    def forward(self, x: Tensor) -> Tensor:
        z = self.features(x, *([x] if self.kind == "more arguments" else []))
        if self.kind == "limit":
            z = z.clamp(max=2.0) if z.shape[-1] == 6 else z
        if self.kind == "output":
            return 2 * self.head(z)
        if self.kind == "head of the body":
            return self.head(z)[:, :1]
        return self.head(z)


class Wide(Net):
    """Features that are small at first."""

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).clamp(max=100.0))


UNCUT = {
    "scale": lambda: Net(Scale()),
    "buffer": lambda: Net(Scale(learned=False)),
    "normalise": lambda: Net(nn.LayerNorm(6, elementwise_affine=False)),
    "pool": lambda: Net(nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Flatten())),
    "dropout": lambda: Net(nn.Dropout(0.5)),
    "tied": lambda: Variant("tied"),
    "head of the body": lambda: Variant("head of the body"),
    "more arguments": lambda: Variant("more arguments"),
    "output": lambda: Variant("output"),
}


class Pooled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool1d(self.features(x)[:, None], 2)[:, 0])


UNCUT["pool"] = Pooled
UNCUT["limit"] = Wide


def gradient_of(model: nn.Module, problem_inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    inner = InnerLoop(sgd(0.3), (), "global", {})
    problem = Problem(model, OBJECTIVES["regression"], inner, 1, problem_inputs)
    algorithm = maml(problem, inner_steps=2, adapt=["head.*"])
    generator = torch.Generator().manual_seed(3)
    shape = {"dtype": torch.float64, "generator": generator}
    data = [torch.randn(5, 1, **shape) for _ in range(4)]
    episode = Episodes(*data)
    # away from the start, where a factor is no longer 1
    meta = {k: (v + 0.3).requires_grad_() for k, v in algorithm.init().items()}
    torch.manual_seed(2)
    loss, _ = algorithm.loss(meta, episode)
    grads = torch.autograd.grad(loss, list(meta.values()), materialize_grads=True)
    return loss, dict(zip(meta, grads, strict=True))


@pytest.mark.parametrize("kind", UNCUT)
def test_what_features_and_head_leave_out_is_computed(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = UNCUT[kind]().double()
    examples = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    state = torch.get_rng_state()
    loss, grads = gradient_of(model, lambda: [examples])
    assert "features are computed anew at each inner step" in caplog.text
    torch.set_rng_state(state)
    expected_loss, expected = gradient_of(model, None)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(grads[name], value) for name, value in expected.items())


class Foreign(nn.Module):
    """Its constants are drawn by others than torch, and no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.scale = [float(np.random.standard_normal()), random.gauss(0, 1)]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x) * self.scale[0] + self.scale[1]
        return result


def test_constants_that_others_draw_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Foreign] = []

    def make(shape: Any, outputs: int, **_: Any) -> Foreign:
        models.append(Foreign())
        return models[-1]

    swap_builder(monkeypatch, "backbone", "mlp", make)

    def constants(*settings: str) -> list[float]:
        build(config_of(*TINY, "backbone=mlp", *settings), CPU)
        return models[-1].scale

    first = constants()
    state = random.getstate(), np.random.get_state()[1].tolist()
    assert constants() == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state, "the user's own"
    random.random()
    np.random.standard_normal()
    assert constants() == first != constants("seed=1")


class BySize(Net):
    """Halves what it has of many examples."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x) * (0.5 if len(x) > 8 else 1.0))


def test_halves_are_compared_on_queries_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = BySize().double()
    head = [name for name in detached_parameters(model) if name.startswith("head.")]
    few, many = (torch.linspace(-2, 2, n, dtype=torch.float64)[:, None] for n in (5, 10))
    halves(model, head, lambda: [few])
    assert caplog.text == ""
    halves(model, head, lambda: [few, many])
    assert "features are computed anew" in caplog.text


class Sequence(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
        self.last = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


@pytest.mark.parametrize("make", [lambda: Net(nn.Identity()), Sequence])
def test_a_network_of_features_and_head_is_cut(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = make().double()
    head = [name for name in detached_parameters(model) if name.startswith("head.")]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    cut = halves(model, head, lambda: [x])
    assert cut.encode(detached_parameters(model), x).shape == (5, 6) and caplog.text == ""
    loss, grads = gradient_of(model, lambda: [x])
    expected_loss, expected = gradient_of(model, None)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-9, atol=1e-12)


def test_the_comparison_changes_neither_the_network_nor_the_random_state() -> None:
    torch.manual_seed(0)
    model = Net(nn.Sequential(Running(), nn.Dropout(0.5)))
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    halves(model, ["head.weight", "head.bias"], lambda: torch.ones(3, 1))
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


# --- tensors in plain attributes ---------------------------------------------------------------


class Attributed(Net):
    """A projection that is drawn when it is built, and kept as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(1, 1) + 2

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x @ self.projection)
        return result


def test_a_tensor_in_an_attribute_is_a_buffer(built: Callable[..., Setup]) -> None:
    """Whatever another build draws, the network that was trained is the one that goes on."""
    models: list[nn.Module] = []
    setup = built(lambda: models.append(Attributed()) or models[-1])
    kept = snapshot(setup, fresh(setup))
    projection = models[0].projection.clone()
    assert torch.equal(kept["buffers"]["projection"], projection)
    torch.manual_seed(99)
    other = built(lambda: models.append(Attributed()) or models[-1], "seed=5")
    assert not torch.equal(models[-1].projection, projection)
    restore_meta(other, kept)
    assert torch.equal(models[-1].projection, projection)


class Keeping(Net):
    """It subtracts the mean of whatever it sees first."""

    mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean().detach()
        result: Tensor = super().forward(x - self.mean)
        return result


class Masking(Net):
    """It builds a mask at its first call, the same for any data."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(x.shape[-1])
        result: Tensor = super().forward(x * self.mask)
        return result


def test_what_is_kept_of_the_first_data_is_refused(built: Callable[..., Setup]) -> None:
    with pytest.raises(ConfigError, match="keeps in mean what it computes of the first data"):
        built(Keeping)
    built(Masking)


def test_sparse_gradients_are_refused(built: Callable[..., Setup]) -> None:
    def network() -> nn.Module:
        net = Net()
        net.table = nn.Embedding(3, 2, sparse=True)
        return net

    with pytest.raises(ConfigError, match=r"table has sparse gradients.* sparse=False"):
        built(network)
