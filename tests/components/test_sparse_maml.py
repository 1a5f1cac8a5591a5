"""Sparse-MAML against a loop written out, with the derivative of the mask by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.inner_loop import FACTOR_PREFIX
from metarun.errors import ConfigError
from metarun.training.loop import learned_hyper
from metarun.training.state import fresh
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

MASK = f"{FACTOR_PREFIX}mask/"
STEPS = ("algo.inner_steps=3", "algo.eval_inner_steps=5", "inner_opt.lr=0.05")
Meta = dict[str, Tensor]


class Step(torch.autograd.Function):
    """1 where a number is not below 0; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def output(w: Meta, x: Tensor) -> Tensor:
    hidden = F.relu(F.linear(x, w["body.0.weight"], w["body.0.bias"]))
    return F.linear(hidden, w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("order", [1, 2])
def test_masked_steps_with_a_gradient_that_passes_straight_through(order: int) -> None:
    setup = setup_of(*SINE, "algo=sparse_maml", *STEPS, f"algo.order={order}")
    meta, task = stirred(setup), task_of(setup)
    masks = {n.removeprefix(MASK): v for n, v in meta.items() if n.startswith(MASK)}
    signs = torch.cat([m.flatten() >= 0 for m in masks.values()])
    assert signs.any() and not signs.all()
    w, curve = {name: meta[name] for name in masks}, []
    for step in range(6):
        curve.append(F.mse_loss(output(w, task.query_x), task.query_y))
        inner = F.mse_loss(output(w, task.support_x), task.support_y)
        grads = torch.autograd.grad(
            inner, list(w.values()), create_graph=order == 2 and step < 3, retain_graph=True
        )
        w = {
            name: value - 0.05 * Step.apply(masks[name]) * grad
            for (name, value), grad in zip(w.items(), grads, strict=True)
        }
    loss = setup.algorithm.loss(meta, task)[0]
    torch.testing.assert_close(loss, curve[3], rtol=1e-11, atol=0)
    ours, theirs = (torch.autograd.grad(v, list(meta.values())) for v in (loss, curve[3]))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
    trace = setup.algorithm.trace(meta, task).query_loss
    torch.testing.assert_close(trace, torch.stack(curve).detach(), rtol=1e-9, atol=0)
    off = dict(zip(meta, ours, strict=True))[f"{MASK}head.weight"][masks["head.weight"] < 0]
    assert len(off) and (off != 0).all(), "a mask that is off is learned"


@pytest.mark.parametrize("inner_opt", ["sgd", "adam", "rmsprop"])
def test_what_is_masked_stays_where_it_is(inner_opt: str) -> None:
    setup = setup_of(*SINE, "algo=sparse_maml", f"inner_opt={inner_opt}", *STEPS)
    meta, task = dict(stirred(setup)), task_of(setup)
    for name in [n for n in meta if n.startswith(MASK)]:
        meta[name] = torch.full_like(meta[name], -1e-9)
    trace = setup.algorithm.trace(meta, task).query_loss
    assert torch.equal(trace, trace[:1].expand(6))
    meta[f"{MASK}head.bias"] = torch.zeros(1, dtype=torch.float64)  # at 0 it is on
    assert setup.algorithm.trace(meta, task).query_loss[1] != trace[0]


def test_masks_start_around_their_mean_and_by_the_seed() -> None:
    one, same, other = (
        setup_of(*IMAGES, "algo=sparse_maml", "algo.init_shift=0.25", f"seed={seed}")
        for seed in (0, 0, 1)
    )
    first = {n: v for n, v in one.algorithm.init().items() if n.startswith(MASK)}
    assert all(float(v.mean()) == pytest.approx(0.25) for v in first.values())
    conv = first[f"{MASK}body.1.conv.weight"]
    assert conv.abs().max() <= 0.25 + 2 * (6 / 27) ** 0.5 and conv.std() > 0.2
    for name, value in first.items():
        assert torch.equal(value, same.algorithm.init()[name])
        assert value.numel() == 1 or not torch.equal(value, other.algorithm.init()[name])


def test_masks_are_no_scalars_in_the_log() -> None:
    assert learned_hyper(fresh(setup_of(*SINE, "algo=sparse_maml", *STEPS))) == {}


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed"])
def test_exact_gradient_modes_learn_the_same_masks(gradient: str) -> None:
    found = []
    for mode in ("reverse", gradient):
        setup = setup_of(
            *SINE, "algo=sparse_maml", "algo.order=2", *STEPS, f"engine.gradient={mode}"
        )
        found.append(setup.gradient(stirred(setup), setup.train_tasks.sample(0, 2))[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["inner_opt.precondition=kronecker"], "algo=sparse_maml masks the gradients in its place"),
        (["algo.order=2", "engine.gradient=implicit"], "cannot learn what the algorithm learns"),
        (["inner_opt=newton", "algo.adapt=[head.*]"], "takes more of the loss than its gradient"),
        (["algo.inner_steps=0"], "needs inner steps, or its masks are never learned"),
        (["algo.init_shift=nan"], "must be a finite number"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*SINE, "algo=sparse_maml", *settings)
