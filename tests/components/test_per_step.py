"""`algo.per_step`: parameters with a value for each inner step, against loops written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.build import build_model
from metarun.errors import ConfigError
from metarun.unroll._torch import pytree
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of


def test_each_step_and_each_prediction_has_its_own_value() -> None:
    setup = setup_of(
        *SINE, "algo.inner_steps=3", "algo.eval_inner_steps=5", "algo.per_step=[body.0.bias]",
        "inner_opt.lr=0.05",
    )  # fmt: skip
    meta, task = stirred(setup), task_of(setup)
    bias = meta["body.0.bias"]
    assert bias.shape == (3, 6)

    def output(w: dict[str, Tensor], step: int, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, w["body.0.weight"], bias[step]))
        return F.linear(hidden, w["head.weight"], w["head.bias"])

    def losses_after(steps: int) -> list[Tensor]:
        w = {name: value for name, value in meta.items() if name != "body.0.bias"}
        found = [(output(w, 0, task.query_x) - task.query_y).pow(2).mean()]
        for i in range(steps):
            own = min(i, 2)
            loss = (output(w, own, task.support_x) - task.support_y).pow(2).mean()
            grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
            w = {n: p - 0.05 * g for (n, p), g in zip(w.items(), grads, strict=True)}
            found.append((output(w, own, task.query_x) - task.query_y).pow(2).mean())
        return found

    loss, _ = setup.algorithm.loss(meta, task)
    oracle = losses_after(3)[-1]
    torch.testing.assert_close(loss, oracle, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(v, list(meta.values())) for v in (loss, oracle))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    curve = setup.algorithm.trace(meta, task).query_loss
    torch.testing.assert_close(curve, torch.stack(losses_after(5)).detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
def test_gain_and_bias_of_normalisation_per_step(gradient: str) -> None:
    setup = setup_of(
        *IMAGES, "algo.inner_steps=2", "algo.per_step=['*.norm.*']", f"engine.gradient={gradient}"
    )
    meta, task = stirred(setup), task_of(setup)
    names = [name for name in meta if ".norm." in name]
    assert len(names) == 8 and all(meta[name].shape == (2, 3) for name in names)
    assert not set(names) & set(setup.algorithm.adapted or ())
    loss = setup.algorithm.loss
    grads = torch.autograd.grad(loss(meta, task)[0], [meta[name] for name in names])
    generator = torch.Generator().manual_seed(1)
    for name, grad in zip(names, grads, strict=True):
        along = torch.randn(grad.shape, generator=generator, dtype=grad.dtype)

        def at(shift: float, name: str = name, along: Tensor = along) -> float:
            moved = meta | {name: (meta[name] + shift * along).detach().requires_grad_()}
            return float(loss(moved, task)[0].detach())

        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        assert float((grad * along).sum()) == pytest.approx(slope, rel=2e-5, abs=1e-8), name


def test_vmap_loop_and_recordings_agree() -> None:
    found: list[Any] = []
    for how in (("loop", "none"), ("vmap", "none"), ("loop", "replay"), ("vmap", "replay")):
        engine = [f"engine.{k}={v}" for k, v in zip(("batching", "compile"), how, strict=True)]
        setup = setup_of(
            *IMAGES, *engine, "algo.inner_steps=2", "algo.eval_inner_steps=3",
            "algo.per_step=['*.norm.*']",
        )  # fmt: skip
        meta = stirred(setup)
        for _ in range(2 if "replay" in how else 1):  # recorded, then compared
            grads, row = setup.gradient(meta, setup.train_tasks.sample(0, 2))
            with torch.no_grad():
                trace = setup.trace(meta, setup.source.sample("val", 0, 2))
        found.append([*grads.values(), *pytree.tree_leaves(row), *trace])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-9)


def test_a_body_that_changes_by_step_is_not_computed_once() -> None:
    setup = setup_of(*IMAGES, "algo=anil", "algo.inner_steps=2", "algo.per_step=[body.0.norm.bias]")
    meta, task = stirred(setup), task_of(setup)
    (grad,) = torch.autograd.grad(setup.algorithm.loss(meta, task)[0], meta["body.0.norm.bias"])
    assert (grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["algo.per_step=[nothing.*]"], "nothing"),
        (["algo.per_step=['*']"], "leaves nothing to adapt"),
        (["algo.per_step=[head.*]", "algo.inner_steps=0"], "needs inner steps"),
        (["algo.per_step=[head.*]", "engine.gradient=implicit"], "would never be learned"),
        (
            ["algo.per_step=[head.*]", "engine.gradient=truncated", "algo.inner_steps=3"],
            "would never be learned",
        ),
        (
            [
                "inner_opt.learn=[lr]",
                "inner_opt.granularity=step",
                "engine.gradient=truncated",
                "algo.inner_steps=3",
            ],
            "granularity=step: this engine.gradient has no derivative of the earlier",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*IMAGES, *settings)


def test_a_normalisation_without_gain_and_with_its_own_epsilon() -> None:
    """The layer of MAML's reference code."""
    setup = setup_of(*IMAGES, "backbone.norm_gain=false", "backbone.norm_eps=1e-3")
    meta = stirred(setup)
    assert [name for name in meta if ".norm." in name] == [f"body.{i}.norm.bias" for i in range(4)]
    task = task_of(setup)
    x = task.support_x
    for i in range(4):
        weight, bias = meta[f"body.{i}.conv.weight"], meta[f"body.{i}.conv.bias"]
        x = F.conv2d(x, weight, bias, stride=2, padding=1)
        shift = meta[f"body.{i}.norm.bias"]
        x = F.relu(F.batch_norm(x, None, None, None, shift, training=True, eps=1e-3))
    expected = F.linear(x.mean(dim=(-2, -1)), meta["head.weight"], meta["head.bias"])
    model = build_model(setup.config, setup.source)
    ours = torch.func.functional_call(model, meta, (task.support_x,))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
