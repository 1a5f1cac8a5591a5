"""What holds of every backbone that there is: a new one is tested by being there."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.config.catalogue import schemas
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import fresh, restore, snapshot
from metarun.unroll._torch import pytree
from tests.setups import config_of

SIZES: dict[str, tuple[str, ...]] = {  # each as small as it can be
    "conv4": ("backbone.width=3",),
    "identity": (),
    "l2l": (),
    "mlp": ("backbone.hidden=[6]",),
    "mlp_bn": ("backbone.hidden=[6,5]",),
    "r2d2": ("backbone.widths=[2,2,3,3]", "backbone.dropout=0"),
    "resnet10": ("backbone.width=2", "backbone.stem=imagenet"),
    "resnet12": ("backbone.widths=[2,2,3,3]",),
    "resnet18": ("backbone.width=2", "backbone.stem=imagenet"),
    "timm": ("backbone.model=test_resnet",),
    # Its last maps are 1×1: moments of few examples would be all rounding.
    "torchvision": ("backbone.model=shufflenet_v2_x0_5", "task.shot=4", "task.query=5"),
    "wrn28_10": ("backbone.widen=1",),
}
LONG = {"resnet18", "torchvision", "wrn28_10"}
"""They have the layers of resnet10, and so many that recording them takes a minute."""
BACKBONES = [n for n, kind in schemas("backbone").items() if kind.__module__.startswith("metarun.")]
NORMALISED = [name for name in BACKBONES if hasattr(schemas("backbone")[name], "norm")]
SMALL = (
    "data=glyphs", "trainer.meta_batch=2", "trainer.steps=6", "task.way=3", "task.shot=2",
    "task.query=1",
)  # fmt: skip
DOUBLE = ("engine.precision=float64", "engine.compile=none")


def setup_of(backbone: str, *more: str) -> Setup:
    settings = [f"backbone={backbone}", *SMALL, *SIZES.get(backbone, ()), *more]
    return build(config_of(*settings), torch.device("cpu"))


@cache
def double(backbone: str) -> Setup:
    return setup_of(backbone, *DOUBLE)


def moved(setup: Setup) -> dict[str, Tensor]:
    """Meta-parameters that require gradients, and of which none is at its special first value."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, value in setup.algorithm.init().items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        size = float(value.std()) if value.numel() > 1 else 0.0
        found[name] = (value + 0.1 * (size or 1.0) * noise).requires_grad_()
    return found


def learned_from(setup: Setup) -> Any:
    """One training task."""
    return pytree.tree_map(lambda x: x[0], setup.train_tasks.sample(0, 1))


def test_each_has_a_size_here() -> None:
    assert {*SIZES} == {*BACKBONES}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_its_meta_gradient_is_that_of_finite_differences(backbone: str) -> None:
    setup = double(backbone)
    meta, task = moved(setup), learned_from(setup)
    loss, *_ = setup.algorithm.loss(meta, task)
    grads = torch.autograd.grad(loss, list(meta.values()), materialize_grads=True)
    generator = torch.Generator().manual_seed(5)
    along = {
        k: torch.randn(v.shape, generator=generator, dtype=v.dtype) / v.numel() ** 0.5
        for k, v in meta.items()
    }

    def at(shift: float) -> float:
        there = {k: (v.detach() + shift * along[k]).requires_grad_() for k, v in meta.items()}
        return float(setup.algorithm.loss(there, task)[0].detach())

    ours = sum(float((g * a).sum()) for g, a in zip(grads, along.values(), strict=True))
    slopes = [(at(h) - at(-h)) / (2 * h) for h in (1e-8, 1e-10)]  # a ReLU may turn within the first
    assert any(ours == pytest.approx(slope, rel=1e-4, abs=1e-7) for slope in slopes), slopes


def computed(backbone: str, *how: str) -> list[Tensor]:
    """Meta-gradients and metrics of two tasks."""
    setup = setup_of(backbone, DOUBLE[0], *how)
    meta = moved(setup)
    for _ in range(2 if "engine.compile=replay" in how else 1):  # recorded, then compared
        grads, row = setup.gradient(meta, setup.train_tasks.sample(0, 2))
    return [*grads.values(), *pytree.tree_leaves(row)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_tasks_by_vmap_and_in_a_loop_are_the_same(
    backbone: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = [computed(backbone, DOUBLE[1], f"engine.batching={b}") for b in ("loop", "vmap")]
    assert "in a loop over tasks" not in caplog.text
    looped, mapped = (torch.cat([value.flatten() for value in each]) for each in found)
    assert (looped - mapped).norm() < 1e-8 * looped.norm()


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in LONG])
def test_a_recording_has_the_same_bits(backbone: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of an algorithm without inner steps, whose recordings are short."""
    caplog.set_level("INFO")
    algo = "r2d2" if backbone == "identity" else "protonet"  # which would have nothing to learn
    found = [
        computed(backbone, f"algo={algo}", "engine.batching=vmap", f"engine.compile={c}")
        for c in ("none", "replay")
    ]
    assert "not recorded" not in caplog.text
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("norm", ["transductive", "support", "support_plus_one", "running"])
@pytest.mark.parametrize("backbone", NORMALISED)
def test_a_prediction_depends_on_other_queries_only_if_it_is_transductive(
    backbone: str, norm: str
) -> None:
    setup = setup_of(backbone, *DOUBLE, f"backbone.norm={norm}", "algo=protonet")
    state = fresh(setup)
    meta_step(setup, state)
    meta = {name: value.detach() for name, value in state.meta.items()}
    task = pytree.tree_map(lambda x: x[0], setup.source.sample("test", 0, 1))
    assert setup.algorithm.adapt is not None
    predict = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)
    together, alone = predict(task.query_x), predict(task.query_x[:1])
    assert together.isfinite().all()
    same = torch.allclose(alone, together[:1], rtol=1e-7, atol=1e-9)
    assert same == (norm != "transductive")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_first_order_is_another_gradient_of_the_same_loss(backbone: str) -> None:
    setups = [double(backbone), setup_of(backbone, *DOUBLE, "algo.order=1")]
    found = []
    for setup in setups:
        meta = moved(setup)
        loss, _ = setup.algorithm.loss(meta, learned_from(setup))
        grads = torch.autograd.grad(loss, list(meta.values()), materialize_grads=True)
        found.append((loss, torch.cat([grad.flatten() for grad in grads])))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[1][1].isfinite().all() and not torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_its_head_can_be_adapted_alone(backbone: str, caplog: pytest.LogCaptureFixture) -> None:
    """And its features are then computed once a task."""
    caplog.set_level("INFO")
    setup = setup_of(backbone, *DOUBLE, "algo=anil")
    assert setup.algorithm.adapted == ("head.weight", "head.bias")
    assert "features are computed anew" not in caplog.text
    loss, _ = setup.algorithm.loss(moved(setup), learned_from(setup))
    assert loss.isfinite()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(backbone: str) -> None:
    """Float32."""
    whole, first, second = (setup_of(backbone, DOUBLE[1]) for _ in range(3))
    states = [fresh(whole), fresh(first)]
    for _ in range(3):
        meta_step(whole, states[0])
    meta_step(first, states[1])
    torch.manual_seed(99)
    resumed = restore(second, snapshot(first, states[1]))
    for _ in range(2):
        meta_step(second, resumed)
    assert all(torch.equal(value, resumed.meta[k]) for k, value in states[0].meta.items())
