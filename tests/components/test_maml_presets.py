"""BOIL, Meta-SGD and Meta-Curvature: MAML with other settings, against loops written out."""

from typing import Any

import learn2learn as l2l
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.algo.boil import BoilConfig
from metarun.components.algo.inner_loop import FACTOR_PREFIX, RATE_PREFIX
from metarun.config.catalogue import schemas
from metarun.errors import ConfigError
from metarun.training.inert import without_effect
from metarun.training.loop import learned_hyper
from metarun.training.setup import Setup
from metarun.training.state import fresh
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

Meta = dict[str, Tensor]


def images_by_hand(w: Meta, x: Tensor) -> Tensor:
    """conv4 of stride 2 by torch's own functions."""
    for i in range(4):
        name = f"body.{i}"
        x = F.conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2, padding=1)
        gain, shift = w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]
        x = F.relu(F.batch_norm(x, None, None, gain, shift, training=True))
    return F.linear(x.mean(dim=(-2, -1)), w["head.weight"], w["head.bias"])


def gradients(loss: Tensor, meta: Meta) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(meta.values()), retain_graph=True, materialize_grads=True)


def assert_same(setup: Setup, meta: Meta, expected: Tensor, curve: list[Tensor]) -> None:
    """Loss and gradients, and the curve of an evaluation."""
    loss, _ = setup.algorithm.loss(meta, task_of(setup))
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    ours, theirs = gradients(loss, meta), gradients(expected, meta)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
    trace = setup.algorithm.trace(meta, task_of(setup)).query_loss
    torch.testing.assert_close(trace, torch.stack(curve).detach(), rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- BOIL


@pytest.mark.parametrize("order", [1, 2])
def test_boil_adapts_all_but_the_head_and_learns_all(order: int) -> None:
    setup = setup_of(
        *IMAGES, "algo=boil", f"algo.order={order}", "algo.inner_steps=2",
        "algo.eval_inner_steps=4", "inner_opt.lr=0.5",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    w, curve = dict(meta), []
    for step in range(5):
        curve.append(F.cross_entropy(images_by_hand(w, task.query_x), task.query_y))
        names = [name for name in w if not name.startswith("head.")]
        inner = F.cross_entropy(images_by_hand(w, task.support_x), task.support_y)
        exact = order == 2 and step < 2
        grads = torch.autograd.grad(inner, [w[n] for n in names], create_graph=exact)
        w = w | {n: w[n] - 0.5 * g for n, g in zip(names, grads, strict=True)}
    assert_same(setup, meta, curve[2], curve)
    assert setup.algorithm.adapted == tuple(names) and any(".norm." in name for name in names)
    head = torch.autograd.grad(setup.algorithm.loss(meta, task)[0], meta["head.weight"])[0]
    assert head.abs().sum() > 0


def test_boil_in_the_library_adapts_the_body() -> None:
    assert BoilConfig().adapt == ["body.*"]


def test_boil_needs_a_body() -> None:
    with pytest.raises(ConfigError, match="no parameter matches 'trunk"):
        setup_of(*IMAGES, "algo=boil", "algo.adapt=['trunk.*']")


# ---------------------------------------------------------------- Meta-SGD


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_sgd_is_that_of_learn2learn(order: int, steps: int) -> None:
    setup = setup_of(
        *SINE, "algo=meta_sgd", f"algo.order={order}", f"algo.inner_steps={steps}",
        f"algo.eval_inner_steps={steps}",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    rates = {n.removeprefix(RATE_PREFIX): v for n, v in meta.items() if n.startswith(RATE_PREFIX)}
    assert any((rate < 0).any() for rate in rates.values())
    layers = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    names = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    with torch.no_grad():
        for name, parameter in zip(names, layers.parameters(), strict=True):
            parameter.copy_(meta[name])
    learned = nn.ParameterList([nn.Parameter(rates[name].detach().clone()) for name in names])
    oracle = l2l.algorithms.MetaSGD(layers, lrs=learned)
    learner, curve = oracle.clone(), []
    for _ in range(steps):
        curve.append(F.mse_loss(learner(task.query_x), task.query_y))
        inner = F.mse_loss(learner(task.support_x), task.support_y)
        learner.adapt(inner, first_order=order == 1)
    expected = F.mse_loss(learner(task.query_x), task.query_y)
    loss = setup.algorithm.loss(meta, task)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    both = [*names, *(RATE_PREFIX + name for name in names)]
    ours = torch.autograd.grad(loss, [meta[name] for name in both])
    theirs = torch.autograd.grad(expected, [*layers.parameters(), *learned])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    trace = setup.algorithm.trace(meta, task).query_loss
    torch.testing.assert_close(trace, torch.stack([*curve, expected]).detach())


def test_initial_rates_are_drawn_between_two_numbers_and_by_the_seed() -> None:
    one, same, other = (
        setup_of(
            *SINE, "algo=meta_sgd", "algo.rate_low=-0.2", "algo.rate_high=-0.1", f"seed={seed}"
        ).algorithm.init()
        for seed in (3, 3, 4)
    )
    rates = {n: v for n, v in one.items() if n.startswith(RATE_PREFIX)}
    every = torch.cat([v.flatten() for v in rates.values()])
    assert every.min() >= -0.2 and every.max() <= -0.1 and len(set(every.tolist())) == len(every)
    assert all(v.shape == one[n.removeprefix(RATE_PREFIX)].shape for n, v in rates.items())
    assert all(torch.equal(v, same[n]) for n, v in rates.items())
    assert not any(torch.equal(v, other[n]) for n, v in rates.items())


def with_lr() -> list[str]:
    built = {n: s for n, s in schemas("inner_opt").items() if s.__module__.startswith("metarun.")}
    return [n for n, schema in built.items() if hasattr(schema, "lr") and n != "muon"]


@pytest.mark.parametrize("name", with_lr())
def test_meta_sgd_with_every_inner_optimizer_that_has_a_rate(name: str) -> None:
    setup = setup_of(*SINE, "algo=meta_sgd", f"inner_opt={name}", "algo.inner_steps=2")
    meta, task = stirred(setup), task_of(setup)
    names = [n for n in meta if n.startswith(RATE_PREFIX)]
    grads = torch.autograd.grad(setup.algorithm.loss(meta, task)[0], [meta[n] for n in names])
    assert all(g.isfinite().all() for g in grads)
    assert any(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed"])
def test_exact_gradient_modes_learn_the_same_rates(gradient: str) -> None:
    found: list[Any] = []
    for mode in ("reverse", gradient):
        setup = setup_of(*SINE, "algo=meta_sgd", "algo.inner_steps=2", f"engine.gradient={mode}")
        found.append(setup.gradient(stirred(setup), setup.train_tasks.sample(0, 2))[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_rates_are_no_scalars_in_the_log_and_do_not_decay() -> None:
    setup = setup_of(*SINE, "algo=meta_sgd", "outer_opt.weight_decay=0.5")
    state = fresh(setup)
    assert learned_hyper(state) == {}
    for group in state.optimizer.param_groups:
        if any(p is state.meta[RATE_PREFIX + "head.bias"] for p in group["params"]):
            assert group["weight_decay"] == 0


def test_meta_sgd_names_a_rate_that_has_no_effect() -> None:
    setup = setup_of(*SINE, "algo=meta_sgd", "inner_opt.lr=0.3")
    told = without_effect(setup.config, "regression", 1)
    assert told == ["inner_opt.lr=0.3 (algo=meta_sgd learns the rate of each element)"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["inner_opt.learn=[lr]"], r"inner_opt\.learn: the algorithm learns the rate of each"),
        (["inner_opt.groups=[{params: head.*, lr: 0.1}]"], r"inner_opt\.groups: the algorithm"),
        (["inner_opt=newton", "algo.adapt=[head.*]"], "has no lr, only"),
        (["inner_opt=partition"], "has no lr, only"),
        (["engine.gradient=implicit"], "implicit gradients cannot learn"),
        (["algo.rate_low=0.2"], r"algo\.rate_low=0\.2: must not be above"),
        (["algo.rate_high=inf"], "must be a finite number"),
        (["algo.inner_steps=0"], "needs inner steps"),
    ],
)
def test_what_meta_sgd_cannot_do_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*SINE, "algo=meta_sgd", *settings)


# ---------------------------------------------------------------- Meta-Curvature


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_meta_curvature_is_that_of_learn2learn(order: int, steps: int) -> None:
    setup = setup_of(
        *SINE, "algo=meta_curvature", f"algo.order={order}", f"algo.inner_steps={steps}",
        f"algo.eval_inner_steps={steps}",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    layers = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    names = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    oracle = l2l.algorithms.GBML(
        layers, l2l.optim.transforms.MetaCurvatureTransform, lr=0.01, first_order=order == 1
    ).double()
    pairs = list(zip(names, layers.parameters(), strict=True))
    for name, transform in zip(names, oracle.compute_update.transforms_modules, strict=True):
        out, inputs = (f"{FACTOR_PREFIX}curvature_{end}/{name}" for end in ("out", "in"))
        if inputs in meta:  # the first dimension is "in" to it, and the second is transposed
            pairs += [(out, transform.mc_in), (inputs, transform.mc_out)]
        else:
            pairs.append((out, transform.mc))
    with torch.no_grad():
        for name, parameter in pairs:
            value = meta[name]
            parameter.copy_(value.T if "curvature_in" in name else value)
    learner, curve = oracle.clone(), []
    for _ in range(steps):
        curve.append(F.mse_loss(learner(task.query_x), task.query_y))
        learner.adapt(F.mse_loss(learner(task.support_x), task.support_y))
    expected = F.mse_loss(learner(task.query_x), task.query_y)
    loss = setup.algorithm.loss(meta, task)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    trace = setup.algorithm.trace(meta, task).query_loss
    torch.testing.assert_close(trace, torch.stack([*curve, expected]).detach())
    if order == 1:  # there it takes the update for a constant, and its factors get no gradient
        pairs = pairs[:4]
    ours = torch.autograd.grad(loss, [meta[name] for name, _ in pairs])
    theirs = torch.autograd.grad(expected, [parameter for _, parameter in pairs])
    for (name, _), one, other in zip(pairs, ours, theirs, strict=True):
        other = other.T if "curvature_in" in name else other
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_meta_curvature_is_maml_with_the_preconditioner() -> None:
    one = setup_of(*IMAGES, "algo=meta_curvature")
    other = setup_of(*IMAGES, "algo=maml", "inner_opt.precondition=meta_curvature")
    meta, task = stirred(one), task_of(one)
    assert meta.keys() == other.algorithm.init().keys()
    losses = [each.algorithm.loss(meta, task)[0] for each in (one, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["inner_opt.precondition=kronecker"], "algo=meta_curvature has its own; leave it out"),
        (["engine.gradient=implicit"], "implicit gradients cannot learn the factors"),
        (["inner_opt=newton", "algo.adapt=[head.*]"], "takes more of the loss than its gradient"),
        (["algo.inner_steps=0"], "needs inner steps, or its map is never learned"),
    ],
)
def test_what_meta_curvature_cannot_do_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*SINE, "algo=meta_curvature", *settings)


PER_SHOT = (
    *IMAGES, "algo=maml", "task.shot=2", "task.query=4", "algo.eval_inner_steps=1",
)  # fmt: skip


def test_the_outer_loss_of_mamls_code_is_a_sum_over_the_shots() -> None:
    """`reduce_sum(xent(logits, labels) / update_batch_size)` of the queries, for each task."""
    setup = setup_of(*PER_SHOT, "algo.outer_reduction=per_shot")
    meta, task = stirred(setup), task_of(setup)
    assert setup.algorithm.adapt is not None
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    expected = F.cross_entropy(scores, task.query_y, reduction="none").div(2).sum()
    loss, extra = setup.algorithm.loss(meta, task)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # What is logged stays a mean.
    torch.testing.assert_close(extra["loss"], expected * 2 / 12, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "more", [["algo.multi_step_loss=3", "algo.inner_steps=2"], ["algo.first_order_until=1"]]
)
def test_other_outer_losses_are_summed_likewise(more: list[str]) -> None:
    grads, step = [], torch.zeros((), dtype=torch.float64)
    for reduction in ("mean", "per_shot"):
        setup = setup_of(*PER_SHOT, *more, f"algo.outer_reduction={reduction}")
        meta, task = stirred(setup), task_of(setup)
        loss = setup.algorithm.loss(meta, task, step)[0]
        grads.append(torch.autograd.grad(loss, list(meta.values())))
    for mean, summed in zip(*grads, strict=True):
        torch.testing.assert_close(summed, 6 * mean, rtol=1e-11, atol=1e-13)
