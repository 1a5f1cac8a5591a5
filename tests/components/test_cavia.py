"""CAVIA against loops written out: contexts joined to inputs, and scales and shifts by them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.cavia import cavia
from metarun.errors import ConfigError
from metarun.unroll import sgd
from tests.setups import IMAGES, SINE, config_of, setup_of, stirred, task_of

Meta = dict[str, Tensor]


def with_input(meta: Meta, context: Tensor, x: Tensor) -> Tensor:
    """The context beside each example at the first layer."""
    joined = torch.cat([x, context.expand(len(x), -1)], dim=1)
    first = torch.cat([meta["body.0.weight"], meta["context.weight"]], dim=1)
    hidden = F.relu(F.linear(joined, first, meta["body.0.bias"]))
    return F.linear(hidden, meta["head.weight"], meta["head.bias"])


def with_film(meta: Meta, context: Tensor, x: Tensor) -> Tensor:
    """Scales and shifts behind the third normalisation."""
    for i in range(4):
        name = f"body.{i}"
        x = F.conv2d(x, meta[f"{name}.conv.weight"], meta[f"{name}.conv.bias"], stride=2, padding=1)
        gain, shift = meta[f"{name}.norm.weight"], meta[f"{name}.norm.bias"]
        x = F.batch_norm(x, None, None, gain, shift, training=True)
        if i == 2:
            film = F.linear(context, meta["context.weight"], meta["context.bias"])
            x = film[:3].view(1, -1, 1, 1) * x + film[3:].view(1, -1, 1, 1)
        x = F.relu(x)
    return F.linear(x.mean(dim=(-2, -1)), meta["head.weight"], meta["head.bias"])


def by_hand(
    output: Callable[..., Tensor], loss: Callable[..., Tensor], meta: Meta, task: Any, count: int,
    steps: int, order: int,
) -> list[Tensor]:  # fmt: skip
    context, found = torch.zeros(count, dtype=torch.float64, requires_grad=True), []
    for step in range(steps + 1):
        found.append(loss(output(meta, context, task.query_x), task.query_y))
        if step < steps:
            inner = loss(output(meta, context, task.support_x), task.support_y)
            (grad,) = torch.autograd.grad(
                inner, context, create_graph=order == 2, retain_graph=True
            )
            context = context - 1.0 * grad
    return found


CASES = {
    "sine": (SINE, with_input, F.mse_loss, 5),
    "images": (IMAGES, with_film, F.cross_entropy, 100),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_only_a_context_is_adapted(case: str, order: int) -> None:
    base, output, loss_fn, count = CASES[case]
    setup = setup_of(*base, "algo=cavia", f"algo.order={order}", "algo.eval_inner_steps=4")
    assert setup.config.inner_opt.lr == 1.0 and setup.algorithm.adapted == ("context.values",)
    meta, task = stirred(setup), task_of(setup)
    assert "context.values" not in meta and meta["context.weight"].shape[1] == count
    loss = setup.algorithm.loss(meta, task)[0]
    expected = by_hand(output, loss_fn, meta, task, count, 2, order)[-1]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    both = (torch.autograd.grad(v, list(meta.values())) for v in (loss, expected))
    torch.testing.assert_close(*both, rtol=1e-7, atol=1e-10)
    trace = setup.algorithm.trace(meta, task).query_loss
    curve = torch.stack(by_hand(output, loss_fn, meta, task, count, 4, 1)).detach()
    torch.testing.assert_close(trace, curve, rtol=1e-9, atol=1e-11)


def test_the_maps_of_a_context_start_as_a_linear_layer_does_and_by_the_seed() -> None:
    one, same, other = (
        setup_of(*SINE, "algo=cavia", "algo.contexts=400", f"seed={s}").algorithm.init()
        for s in (0, 0, 1)
    )
    assert one["context.weight"].abs().max() <= 401**-0.5 < 1.05 * one["context.weight"].abs().max()
    assert torch.equal(one["context.weight"], same["context.weight"])
    assert not torch.equal(one["context.weight"], other["context.weight"])


@pytest.mark.parametrize("layer", ["body.0.norm", "head"])
def test_another_layer_can_take_the_context(layer: str) -> None:
    setup = setup_of(*IMAGES, "algo=cavia", f"algo.layer={layer}", "algo.contexts=7")
    meta, task = stirred(setup), task_of(setup)
    assert meta["context.weight"].shape == ((6, 7) if layer != "head" else (3, 7))
    usual = setup_of(*IMAGES, "algo=cavia", "algo.contexts=7")
    traces = [each.algorithm.trace(stirred(each), task).query_loss for each in (setup, usual)]
    assert traces[0][-1] != traces[0][0] and not torch.allclose(*traces)


@pytest.mark.parametrize("inner_opt", ["adam", "rmsprop", "newton"])
def test_other_inner_optimizers_move_the_context(inner_opt: str) -> None:
    setup = setup_of(*SINE, "algo=cavia", f"inner_opt={inner_opt}")
    meta = stirred(setup)
    grads, _ = setup.gradient(meta, setup.train_tasks.sample(0, 2))
    assert all(g.isfinite().all() for g in grads.values()) and grads["context.weight"].any()


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed"])
def test_exact_gradient_modes_change_nothing(gradient: str) -> None:
    found = []
    for mode in ("reverse", gradient):
        setup = setup_of(*SINE, "algo=cavia", f"engine.gradient={mode}", "inner_opt.learn=[lr]")
        found.append(setup.gradient(stirred(setup), setup.train_tasks.sample(0, 2))[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_the_inner_rate_of_the_paper_is_usual_and_can_be_set() -> None:
    for data in ("data=glyphs", "data=sinusoid"):
        assert config_of("algo=cavia", data).inner_opt.lr == 1.0
    assert config_of("algo=cavia", "inner_opt.lr=0.5").inner_opt.lr == 0.5
    assert config_of("algo=cavia", "inner_opt=adam").inner_opt.lr == 0.01
    assert config_of("algo=maml").inner_opt.lr == 0.4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["algo.layer=body.1.relu"], r"algo\.layer=body\.1\.relu: algo=cavia needs a linear layer"),
        (["backbone.norm_gain=false"], r"no body\.2\.norm\.weight that is learned"),
        (["algo.contexts=0"], r"algo\.contexts=0: must be from 1"),
        (["inner_opt.groups=[{params: head.*, lr: 0.1}]"], "no parameter matches 'head"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of(*IMAGES, "algo=cavia", *settings)


def test_a_network_without_such_a_layer_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3))
    problem = Problem(model, OBJECTIVES["classification"], InnerLoop(sgd(), (), "global", {}), 3)
    with pytest.raises(ValueError, match="of the backbone these are: none"):
        cavia(problem)


def test_what_a_task_makes_is_no_adapted_parameter() -> None:
    setup = setup_of("data=glyphs", "backbone=mlp", "backbone.hidden=[3]", "algo=cavia")
    assert setup.parameters["adapted"] is None and setup.parameters["learned"]
    setup = setup_of("data=glyphs", "backbone=mlp", "backbone.hidden=[3]", "algo=anil")
    assert setup.parameters["adapted"] == 3 * 5 + 5
