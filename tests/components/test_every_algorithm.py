"""What holds of every algorithm that there is: a new one is tested by being there."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.components.algo.inner_loop import FACTOR_PREFIX, RATE_PREFIX
from metarun.components.algo.one_model import OneModelConfig
from metarun.config.catalogue import schemas
from metarun.episodes.source import Episodes
from metarun.training.evaluation import evaluate_split
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import TrainState, fresh, restore, snapshot
from metarun.unroll._torch import pytree
from tests.conftest import Metarun
from tests.setups import config_of

pytestmark = pytest.mark.usefixtures("two_blocks")
CPU = torch.device("cpu")
ALGORITHMS = [
    name for name, kind in schemas("algo").items() if kind.__module__.startswith("metarun.")
]
IMAGES = ("data=glyphs", "backbone=conv4", "backbone.width=4", "task.way=3")
NETWORKS = {
    "conv4": IMAGES,
    "mlp": ("data=glyphs", "backbone=mlp", "backbone.hidden=[8]", "task.way=3"),
}
REGRESSES = {"cnp": ("data=sinusoid", "backbone=mlp", "backbone.hidden=[8]")}  # without classes
SMALL = ("trainer.meta_batch=2", "trainer.steps=6", "task.shot=2", "task.query=2")
# Algorithms of this type train one model on labelled examples. Tests of tasks, of their vmap and of
# a predictor for each have nothing to test in them.
ONE_MODEL = {name for name in ALGORITHMS if issubclass(schemas("algo")[name], OneModelConfig)}
EXAMPLES = ("data=glyphs_examples", "data.classes=3", "trainer.steps=6", "algo.batch_size=4")
TASKS = [name for name in ALGORITHMS if name not in ONE_MODEL]
CONTROLS = {"nearest_neighbour", "scratch"}  # they meta-learn nothing: no gradient, no meta-step
LEARNERS = [name for name in ALGORITHMS if name not in CONTROLS]
SURROGATE = {
    "reptile",  # its gradient is θ − φ, of no loss: see test_reptile.py
    "sparse_maml",  # a step function learns by the derivative of the identity
    "imaml",  # it is that of a minimum, which 16 inner steps come near: see test_imaml.py
}
FEW_STEPS = {  # in training, where the defaults take many; and what matters in second order
    "reptile": ("algo.inner_steps=3",),
    "imaml": ("algo.inner_steps=3", "engine.solver_steps=2"),
    "proto_maml": ("algo.order=2", "inner_opt.lr=0.1"),
    "unicorn_maml": ("algo.order=2", "algo.inner_steps=2"),
    "sparse_maml": ("algo.order=2", "algo.inner_steps=2"),
    "maml_pp": ("algo.inner_steps=2",),
    "cnp": ("algo.encoder=[32,32]", "algo.decoder=[32]"),
    "look_ahead": ("inner_opt.learn=[lr]", "algo.weigh=network", "algo.real=2", "algo.updates=2"),
}
for name in ALGORITHMS:
    if hasattr(schemas("algo")[name], "eval_inner_steps"):
        FEW_STEPS[name] = (*FEW_STEPS.get(name, ()), "algo.eval_inner_steps=2")
FIRST_ORDER: dict[str, tuple[str, ...]] = {
    name: ("algo.order=1",) for name in ALGORITHMS if hasattr(schemas("algo")[name], "order")
}


def setup_of(algo: str, *more: str, network: str = "conv4") -> Setup:
    return build(config_of(*of_algorithm(algo, network), *more), CPU)


def of_algorithm(algo: str, network: str = "conv4") -> list[str]:
    """A small run, on data that the algorithm is for."""
    data = (*REGRESSES.get(algo, NETWORKS[network]), *SMALL)
    if algo in ONE_MODEL:
        of_tasks = ("data=", "task.")
        data = (*(own for own in NETWORKS[network] if not own.startswith(of_tasks)), *EXAMPLES)
    return [f"algo={algo}", *data, *FEW_STEPS.get(algo, ())]


@cache
def double(algo: str, network: str) -> Setup:
    return setup_of(algo, "engine.precision=float64", "engine.compile=none", network=network)


def moved(setup: Setup, seed: int = 0) -> dict[str, Tensor]:
    """Meta-parameters that are not the initial ones, where some are zero."""
    generator = torch.Generator().manual_seed(seed)
    kept = setup.algorithm.kept
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if name not in kept
        else value
        for name, value in setup.algorithm.init().items()
    }


def task_of(setup: Setup, index: int = 0, split: str = "val") -> Episodes:
    return Episodes(*(part[0] for part in setup.source.sample(split, index, 1)))


def learned_from(setup: Setup) -> Any:
    """One training task, or plain batch."""
    return pytree.tree_map(lambda x: x[0], setup.train_tasks.sample(0, 1))


def trained(setup: Setup, steps: int, state: TrainState | None = None) -> TrainState:
    state = fresh(setup) if state is None else state
    for _ in range(steps):
        meta_step(setup, state)
    return state


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algo", [name for name in LEARNERS if name not in SURROGATE])
def test_its_meta_gradient_is_that_of_finite_differences(algo: str, network: str) -> None:
    setup = double(algo, network)
    meta = {name: value.requires_grad_() for name, value in moved(setup).items()}
    task, loss = learned_from(setup), setup.algorithm.loss
    grads = torch.autograd.grad(loss(meta, task)[0], list(meta.values()), materialize_grads=True)
    for seed in range(2):
        along = {k: v - meta[k].detach() for k, v in moved(setup, seed + 1).items()}

        def at(shift: float, along: dict[str, Tensor] = along) -> float:
            with torch.no_grad():
                shifted = {k: v.detach() + shift * along[k] for k, v in meta.items()}
            return float(
                loss({k: v.requires_grad_() for k, v in shifted.items()}, task)[0].detach()
            )

        h = 1e-6  # so small that no ReLU turns
        slope = (at(h) - at(-h)) / (2 * h)
        ours = sum(float((g * a).sum()) for g, a in zip(grads, along.values(), strict=True))
        assert ours == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("algo", "network"),
    [(algo, "conv4") for algo in ALGORITHMS]
    # Without maps and normalisation, where that makes a difference to the algorithm.
    + [(algo, "mlp") for algo in ("maml", "maml_pp", "cavia", "relationnet", "dkt", "scratch")],
)
def test_tasks_by_vmap_in_a_loop_and_recorded_are_the_same(
    algo: str, network: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found: list[Any] = []
    hows = [(b, c) for b in ("loop", "vmap") for c in ("none", "replay")]
    for how in hows[:2] if algo in ONE_MODEL else hows:
        engine = [f"engine.{k}={v}" for k, v in zip(("batching", "compile"), how, strict=True)]
        setup = setup_of(algo, "engine.precision=float64", *engine, network=network)
        meta = moved(setup)
        leaves = {name: value.requires_grad_() for name, value in meta.items()}
        for _ in range(2 if "replay" in how else 1):  # recorded, then compared
            learned: Any = ()
            if algo in LEARNERS:
                learned = setup.gradient(leaves, setup.train_tasks.sample(0, 2))
            if setup.advance is not None:
                learned = (learned, setup.advance(leaves, setup.train_tasks.sample(0, 1), 2))
            with torch.no_grad():
                trace = setup.trace(meta, setup.source.sample("val", 0, 2))
        found.append([*pytree.tree_leaves(learned), *trace])
    assert "not recorded" not in caplog.text
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-9)
    assert all(torch.equal(*pair) for pair in zip(found[0], found[1], strict=True))
    assert all(torch.equal(*pair) for pair in zip(found[-2], found[-1], strict=True))


@pytest.mark.parametrize("algo", ["maml", "protonet", "reptile", "baseline", "look_ahead"])
def test_one_of_each_kind_is_recorded_in_a_new_process_with_threads(
    algo: str, metarun: Metarun
) -> None:
    """What a thread meets for the first time must not look like a counter of the network's."""
    done = metarun(
        "train", *of_algorithm(algo), "trainer.steps=12", "trainer.eval_episodes=2",
        "trainer.test_episodes=2", OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert "not recorded" not in done.stderr, done.stderr


@pytest.mark.parametrize("algo", FIRST_ORDER)
def test_first_order_is_another_gradient_of_the_same_loss(algo: str) -> None:
    rows = []
    for more in ((), FIRST_ORDER[algo]):
        setup = setup_of(algo, "engine.precision=float64", "algo.inner_steps=2", *more)
        grads, row = setup.gradient(fresh(setup).meta, setup.source.sample("train", 0, 2))
        rows.append((row.loss, torch.cat([g.flatten() for g in grads.values()])))
    (loss, exact), (same, first) = rows
    torch.testing.assert_close(loss, same)
    assert not torch.allclose(exact, first)


def renumbered(name: str, value: Tensor, order: Tensor) -> Tensor:
    """A meta-parameter with its classes in another order, where it has something of each."""
    of_head = name.startswith(("head.", f"{RATE_PREFIX}head."))
    of_head |= name.startswith(FACTOR_PREFIX) and "/head." in name
    if not of_head or "curvature_in" in name:
        return value
    rows = value[order]
    return rows[:, order] if "curvature_out" in name and value.dim() == 2 else rows


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algo", [name for name in TASKS if name not in REGRESSES])
def test_the_names_of_classes_do_not_matter(algo: str, network: str) -> None:
    """Other numbers for the classes give the outputs in another order; a head has one, too."""
    setup = double(algo, network)
    assert setup.algorithm.adapt is not None
    meta, task, order = moved(setup), task_of(setup), torch.tensor([2, 0, 1])
    head = {name: renumbered(name, value, order) for name, value in meta.items()}
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    renamed = order.argsort()[task.support_y]
    others = setup.algorithm.adapt(head, task.support_x, renamed, 3)(task.query_x)
    torch.testing.assert_close(others, scores[:, order], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("algo", TASKS)
def test_its_predictor_scores_as_an_evaluation_does(algo: str) -> None:
    setup = double(algo, "conv4")
    assert setup.algorithm.adapt is not None
    meta = moved(setup)
    for index in range(3):
        task = task_of(setup, index, "test")
        outputs = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
        trace = setup.algorithm.trace(meta, task)
        score = setup.objective.score(outputs, task.query_y)
        assert float(trace.query_score[-1]) == float(score)
        torch.testing.assert_close(
            trace.query_loss[-1], setup.objective.loss(outputs, task.query_y)
        )


@cache
def begun(algo: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checkpoint of a run after two meta-steps, and its meta-parameters."""
    setup = setup_of(algo)
    state = trained(setup, 2)
    return snapshot(setup, state), {name: value.clone() for name, value in state.meta.items()}


@pytest.mark.parametrize("algo", LEARNERS)
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(algo: str) -> None:
    whole, second = trained(setup_of(algo), 4), setup_of(algo)
    torch.manual_seed(99)
    resumed = trained(second, 2, restore(second, begun(algo)[0]))
    assert all(torch.equal(value, resumed.meta[name]) for name, value in whole.meta.items())


@pytest.mark.parametrize("algo", LEARNERS)
def test_another_seed_is_another_run(algo: str) -> None:
    """The same one is the same run, as the test before shows."""
    other = trained(setup_of(algo, "seed=1"), 2).meta
    assert any(not torch.equal(other[name], value) for name, value in begun(algo)[1].items())


SHORT = {  # of a training that is short
    "baseline": ("algo.eval_inner_steps=40",),
    "baseline_pp": ("algo.eval_inner_steps=40",),
    "feat": ("algo.temperature=1",),  # the default is for many features
    "imaml": ("inner_opt.lr=0.05", "engine.solver_steps=2", "outer_opt.lr=0.002"),
    "cavia": ("outer_opt.lr=0.02",),
    "look_ahead": ("inner_opt.lr=0.1",),
}
STEPS = {"imaml": 100, "cnp": 250}  # a likelihood learns the deviations first; else 60
OF_CONVOLUTIONS = {"cavia", "relationnet"}  # which change and compare maps


@pytest.mark.parametrize("algo", LEARNERS)
def test_a_short_training_beats_its_own_start(algo: str) -> None:
    network = "conv4" if algo in OF_CONVOLUTIONS else "mlp"
    size = "backbone.width=8" if algo in OF_CONVOLUTIONS else "backbone.hidden=[32]"
    small = ("trainer.meta_batch=4", "task.query=5", "outer_opt.lr=0.005")
    if algo in ONE_MODEL:
        small = ("data.classes=10", "outer_opt.lr=0.01", "algo.batch_size=16")
    if algo in REGRESSES:
        size = "task.shot=10"
    setup = setup_of(algo, size, *small, *SHORT.get(algo, ()), network=network)
    state, losses = fresh(setup), []
    for _ in range(2):
        found = evaluate_split(setup, setup.trace, state.meta, "val", 20, lambda done: None)
        losses.append(float(found.losses[:, -1].mean()))
        trained(setup, STEPS.get(algo, 60) * (len(losses) == 1), state)
    assert losses[1] < 0.9 * losses[0], losses[1] / losses[0]
