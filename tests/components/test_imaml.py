"""iMAML against closed forms of quadratic losses, and the reference code's variant by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.training.loop import learned_hyper, meta_step
from metarun.training.setup import Setup
from metarun.training.state import fresh
from tests.setups import SINE, config_of, setup_of, stirred, task_of

QUADRATIC = (*SINE, "backbone.hidden=[]", "inner_opt.lr=0.03")
Meta = dict[str, Tensor]


def flat(meta: Meta) -> Tensor:
    return torch.cat([meta["head.weight"].flatten(), meta["head.bias"]])


def system(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error of a line is ½ φᵀHφ − gᵀφ, up to a constant."""
    rows = torch.cat([x, torch.ones_like(x)], 1)
    return 2 / len(x) * rows.T @ rows, 2 / len(x) * rows.T @ y[:, 0]


def grads_of(setup: Setup, meta: Meta, task: Episodes) -> tuple[Tensor, Tensor]:
    loss = setup.algorithm.loss(meta, task)[0]
    return loss.detach(), flat(
        dict(zip(meta, torch.autograd.grad(loss, meta.values()), strict=True))
    )


def test_the_paper_differentiates_the_minimum_of_a_proximal_loss() -> None:
    """In closed form, and by finite differences of where 600 steps end."""
    setup = setup_of(*QUADRATIC, "algo=imaml", "algo.inner_steps=600", "engine.proximal=0.7")
    meta, task = stirred(setup), task_of(setup)
    (h, g), eye = system(task.support_x, task.support_y), torch.eye(2, dtype=torch.float64)

    def outer(theta: Tensor) -> Tensor:
        end = torch.linalg.solve(h + 0.7 * eye, g + 0.7 * theta)
        return (task.query_x * end[0] + end[1] - task.query_y).square().mean()

    theta = flat(meta).detach().requires_grad_()
    expected = outer(theta)
    loss, ours = grads_of(setup, meta, task)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, theta)[0], rtol=1e-8, atol=1e-9)
    for name, slot in (("head.weight", 0), ("head.bias", 1)):
        ends = [
            float(setup.algorithm.loss(meta | {name: meta[name] + h_}, task)[0].detach())
            for h_ in (1e-5, -1e-5)
        ]
        assert float(ours[slot]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_a_learned_strength_has_the_derivative_of_the_minimum() -> None:
    """In closed form, and by finite differences of where 600 steps end."""
    setup = setup_of(
        *QUADRATIC, "algo=imaml", "algo.inner_steps=600", "engine.proximal=0.7",
        "algo.learn_proximal=true", "algo.eval_inner_steps=600",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    assert setup.algorithm.init()["algo.proximal"].item() == pytest.approx(math.log(0.7))
    (h, g), eye = system(task.support_x, task.support_y), torch.eye(2, dtype=torch.float64)

    def outer(theta: Tensor, logarithm: Tensor) -> Tensor:
        end = torch.linalg.solve(h + logarithm.exp() * eye, g + logarithm.exp() * theta)
        return (task.query_x * end[0] + end[1] - task.query_y).square().mean()

    point = (flat(meta).detach().requires_grad_(), meta["algo.proximal"])
    expected = torch.autograd.grad(value := outer(*point), point)
    loss = setup.algorithm.loss(meta, task)[0]
    torch.testing.assert_close(loss, value, rtol=1e-9, atol=1e-12)
    found = dict(zip(meta, torch.autograd.grad(loss, list(meta.values())), strict=True))
    ours = (flat(found), found["algo.proximal"])
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        above, below = (
            setup.algorithm.loss({**meta, "algo.proximal": meta["algo.proximal"] + far}, task)[0]
            for far in (1e-5, -1e-5)
        )
        trace = setup.algorithm.trace(meta, task).query_loss  # evaluations have the term as well
    differences = float(above - below) / 2e-5
    assert float(found["algo.proximal"]) == pytest.approx(differences, rel=1e-6)
    assert len(trace) == 601 and float(trace[-1]) == pytest.approx(value.item(), rel=1e-9)


def test_a_constant_strength_is_where_a_learned_one_starts() -> None:
    settings = (*SINE, "algo=imaml", "algo.inner_steps=3", "inner_opt.lr=0.03")
    plain, learned = setup_of(*settings), setup_of(*settings, "algo.learn_proximal=true")
    meta = stirred(plain)
    also = meta | {"algo.proximal": learned.algorithm.init()["algo.proximal"].requires_grad_()}
    tasks = plain.train_tasks.sample(0, 2)
    ours, theirs = learned.gradient(also, tasks)[0], plain.gradient(meta, tasks)[0]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-12)
    state = fresh(learned)
    meta_step(learned, state)
    assert state.meta["algo.proximal"].item() != also["algo.proximal"].item()
    assert learned_hyper(state)["algo/proximal"] == state.meta["algo.proximal"].item()


@pytest.mark.parametrize("steps", [1, 16])
def test_the_code_takes_plain_steps_and_one_back_and_damps_the_system(steps: int) -> None:
    setup = setup_of(
        *QUADRATIC, "algo=imaml", "algo.variant=code", f"algo.inner_steps={steps}",
        "engine.proximal=2", "engine.solver_steps=2",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    h, g = system(task.support_x, task.support_y)
    theta = flat(meta).detach()
    phi = theta
    for _ in range(steps):
        phi = phi - 0.03 * (h @ phi - g)
    phi = (phi - 0.03 * 2 * (phi - theta)).requires_grad_()
    query = (task.query_x * phi[0] + phi[1] - task.query_y).square().mean()
    u = torch.autograd.grad(query, phi)[0]
    loss, ours = grads_of(setup, meta, task)
    torch.testing.assert_close(loss, query.detach(), rtol=1e-11, atol=0)
    expected = torch.linalg.solve(2 * torch.eye(2, dtype=torch.float64) + h / 12, u)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-11)


def test_five_steps_of_conjugate_gradients_on_a_network() -> None:
    """Not solved to the end: the iterates are those of the code's own system."""
    setup = setup_of(
        *SINE, "backbone.hidden=[4]", "algo=imaml", "algo.variant=code", "algo.inner_steps=3",
        "inner_opt.lr=0.03",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    names = list(meta)
    sizes = [meta[name].numel() for name in names]

    def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = torch.split(vector, sizes)
        w = {n: p.view(meta[n].shape) for n, p in zip(names, parts, strict=True)}
        hidden = F.relu(F.linear(x, w["body.0.weight"], w["body.0.bias"]))
        return F.mse_loss(F.linear(hidden, w["head.weight"], w["head.bias"]), y)

    theta = torch.cat([meta[name].detach().flatten() for name in names])
    phi, support = theta, (task.support_x, task.support_y)
    for _ in range(3):
        phi = phi - 0.03 * torch.func.grad(loss)(phi, *support)
    phi = phi - 0.03 * 2 * (phi - theta)
    u = torch.func.grad(loss)(phi, task.query_x, task.query_y)
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, *support), phi)
    matrix = 2 * torch.eye(len(phi), dtype=torch.float64) + hessian / 12
    x, r = torch.zeros_like(u), u
    p = r
    for _ in range(5):
        image = matrix @ p
        alpha = (r @ r) / (p @ image)
        x, old = x + alpha * p, r
        r = r - alpha * image
        p = r + (r @ r) / (old @ old) * p
    value = setup.algorithm.loss(meta, task)[0]
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(meta.values()))])
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("variant", "gradient"), [("paper", "implicit"), ("code", "reverse")])
def test_evaluations_have_the_proximal_term_in_the_paper_alone(variant: str, gradient: str) -> None:
    setup = setup_of(*SINE, "algo=imaml", f"algo.variant={variant}", "algo.eval_inner_steps=5")
    other = setup_of(*SINE, "algo=maml", "algo.eval_inner_steps=5", f"engine.gradient={gradient}")
    meta, task = stirred(setup), task_of(setup)
    with torch.no_grad():
        traces = [each.algorithm.trace(meta, task).query_loss for each in (setup, other)]
    assert torch.equal(*traces) and len(traces[0]) == 6


@pytest.mark.parametrize(
    ("inner_opt", "own"),
    [
        ("sgd", "algo.variant=code"),
        ("adam", "algo.variant=code"),
        ("rprop", "algo.variant=code"),
        ("adam", "algo.learn_proximal=true"),
    ],
)
def test_vmap_loop_and_recordings_agree(inner_opt: str, own: str) -> None:
    found: list[Any] = []
    for how in (("loop", "none"), ("loop", "replay"), ("vmap", "none"), ("vmap", "replay")):
        engine = [f"engine.{k}={v}" for k, v in zip(("batching", "compile"), how, strict=True)]
        setup = setup_of(
            *SINE, "algo=imaml", own, "algo.inner_steps=3", *engine,
            f"inner_opt={inner_opt}",
        )  # fmt: skip
        meta = stirred(setup)
        for _ in range(2 if "replay" in how else 1):  # recorded, then compared
            grads = setup.gradient(meta, setup.train_tasks.sample(0, 2))[0]
        found.append(grads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-9)


def test_the_mode_is_in_the_config_and_steps_are_taken() -> None:
    engine = config_of("algo=imaml").engine
    assert (engine.gradient, engine.proximal, engine.solver_steps) == ("implicit", 2.0, 5)
    setup = setup_of(*SINE, "algo=imaml", "algo.inner_steps=2")
    state = fresh(setup)
    before = state.meta["head.weight"].detach().clone()
    meta_step(setup, state)
    assert not torch.equal(before, state.meta["head.weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine.gradient=reverse"], "algo=imaml differentiates implicitly: leave out"),
        (["inner_opt.learn=[lr]"], r"implicit gradients cannot learn lr"),
        (["inner_opt.precondition=kronecker"], r"leave inner_opt\.precondition out"),
        (["algo.variant=code", "engine.solver=neumann"], "conjugate gradients alone"),
        (["algo.variant=code", "algo.adapt=[head.*]"], "adapts all parameters"),
        (["algo.variant=code", "algo.learn_proximal=true"], "has a constant λ"),
        (["algo.inner_steps=0"], "must be from 1"),
        (["algo.adapt=[]"], "algo.adapt is empty"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*SINE, "algo=imaml", *settings)
