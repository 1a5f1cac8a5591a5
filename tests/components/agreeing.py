"""What the contract tests look at with default settings, for other ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.unroll._torch import pytree
from tests.setups import IMAGES, SMALL, setup_of, stirred

VECTORS = (
    "data=glyphs", "backbone=mlp", "backbone.hidden=[4]", "task.way=3", "task.query=2", *SMALL,
)  # fmt: skip


def check_gradient(*settings: str) -> dict[str, Tensor]:
    """Compare the gradient of one training task, or plain batch, with finite differences.

    Returns:
        The gradient.
    """
    setup = setup_of(*IMAGES, *settings)
    kept = setup.algorithm.init()
    leaves = {n: kept[n] if n in setup.algorithm.kept else v for n, v in stirred(setup).items()}
    learned = [name for name in leaves if name not in setup.algorithm.kept]
    task = pytree.tree_map(lambda x: x[0], setup.train_tasks.sample(0, 1))
    step = [torch.zeros((), dtype=torch.float64)] if setup.algorithm.follows_step else []
    loss = setup.algorithm.loss(leaves, task, *step)[0]
    grads = torch.autograd.grad(loss, [leaves[n] for n in learned])
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        along = {n: torch.randn(leaves[n].shape, generator=generator).double() for n in learned}

        def at(shift: float, along: dict[str, Tensor] = along) -> float:
            moved = {n: v.detach() + shift * along.get(n, 0 * v) for n, v in leaves.items()}
            return float(setup.algorithm.loss(moved, task, *step)[0])

        h = 1e-6
        ours = sum(float((g * along[n]).sum()) for n, g in zip(learned, grads, strict=True))
        assert ours == pytest.approx((at(h) - at(-h)) / (2 * h), rel=1e-5, abs=1e-8)
    return dict(zip(learned, grads, strict=True))


def check_mapped(
    caplog: pytest.LogCaptureFixture,
    *settings: str,
    network: tuple[str, ...] = VECTORS,
    recorded: bool = True,
) -> None:
    """Compare tasks by vmap, perhaps recorded, with a loop: gradients, metrics, traces."""
    caplog.set_level("INFO")
    found: list[Any] = []
    for batching, compile_ in (("loop", "none"), ("vmap", "replay" if recorded else "none")):
        engine = (f"engine.batching={batching}", f"engine.compile={compile_}")
        setup = setup_of(*network, *settings, *engine)
        meta = stirred(setup)
        for name in setup.algorithm.kept:
            meta[name] = setup.algorithm.init()[name]
        for _ in range(2 if compile_ == "replay" else 1):  # recorded, then compared
            grads, row = setup.gradient(meta, setup.train_tasks.sample(0, 2))
            with torch.no_grad():
                trace = setup.trace(meta, setup.source.sample("val", 0, 2))
        found.append([*grads.values(), *pytree.tree_leaves(row), *trace])
    assert "not recorded" not in caplog.text and "in a loop" not in caplog.text
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)
