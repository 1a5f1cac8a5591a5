"""torch's fused batch normalisation in a loop over tasks: the same, to every derivative taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.components.backbone import norm
from metarun.components.backbone.norm import BatchNorm, collecting
from tests.setups import setup_of, stirred

F64 = torch.float64
IMAGES = (
    "data=glyphs", "backbone=conv4", "backbone.width=3", "task.way=3", "task.query=2",
    "trainer.meta_batch=2", "engine.precision=float64",
)  # fmt: skip


def layers(gain: bool) -> tuple[BatchNorm, BatchNorm]:
    """One that is written out, and one that is fused."""
    made = []
    for fused in (False, True):
        layer = BatchNorm(3, gain=gain).double()
        generator = torch.Generator().manual_seed(1)
        for value in layer.parameters():
            value.data = torch.randn(value.shape, generator=generator, dtype=F64)
        layer.fused = "always" if fused else "never"
        made.append(layer)
    return made[0], made[1]


def first_and_second(layer: BatchNorm, x: Tensor) -> list[Tensor]:
    """Values, a gradient, and the gradient of that gradient's square."""
    x = x.detach().requires_grad_()
    leaves = [x, *layer.parameters()]
    out = layer(x)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(out.shape, generator=generator, dtype=F64)
    first = torch.autograd.grad((weights * out).square().sum(), leaves, create_graph=True)
    squared = sum((grad.square().sum() for grad in first), torch.zeros((), dtype=F64))
    return [out, *first, *torch.autograd.grad(squared, leaves, materialize_grads=True)]


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 6), (1, 3)])
def test_values_and_derivatives_are_those_written_out(shape: tuple[int, ...], gain: bool) -> None:
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    layouts = [x] if x.dim() != 4 else [x, x.contiguous(memory_format=torch.channels_last)]
    for given in layouts:
        written, fused = layers(gain)
        assert fused(given.requires_grad_()).grad_fn.name() == "NativeBatchNormBackward0"  # type: ignore[union-attr]
        for one, other in zip(
            first_and_second(written, given), first_and_second(fused, given), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_it_is_written_out_where_fused_derivatives_are_wrong_or_moments_are_asked_for() -> None:
    written, fused = layers(gain=True)
    x = torch.randn(2, 5, 3, dtype=F64)
    mapped = torch.func.vmap(fused)(x.requires_grad_())
    assert torch.equal(mapped, torch.func.vmap(written)(x))
    with collecting() as seen:
        fused(x[0])
    assert id(fused) in seen.of
    fused.fused = "evaluation"
    assert torch.equal(fused(x[0]), written(x[0]))
    assert fused.eval()(x[0]).grad_fn.name() == "NativeBatchNormBackward0"  # type: ignore[union-attr]


def test_inner_losses_of_large_inputs_are_written_out_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values tell: they differ in their last bits."""
    written, fused = layers(gain=True)
    fused.fused = "but_large_twice"
    x = torch.randn(9, 3, 5, 5, dtype=F64)
    always = layers(gain=True)[1](x)
    assert not torch.equal(always, written(x)), "the two are told apart"

    def inner(layer: BatchNorm) -> Tensor:
        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            out = layer(x)
            return out.square().sum(), out

        out: Tensor = torch.func.grad(loss, has_aux=True)(x)[1]
        return out

    for large, expected in ((x.nbytes, always), (x.nbytes - 1, written(x))):
        monkeypatch.setattr(norm, "LARGE", large)
        assert torch.equal(inner(fused), expected)
        assert torch.equal(fused(x), always), "of queries one derivative is taken"
        assert torch.equal(inner(fused.eval()), always), "nor is it of an evaluation"
        fused.train()


@pytest.mark.parametrize(
    ("algo", "compile_", "large"),
    [
        *((algo, "none", 2**23) for algo in ("maml", "anil", "maml_pp", "protonet", "reptile")),
        *((algo, "replay", 2**23) for algo in ("anil", "protonet", "r2d2")),
        *((algo, "none", 0) for algo in ("maml", "reptile")),
    ],
)
def test_a_loop_has_the_gradient_and_the_scores_of_vmap(
    algo: str, compile_: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "LARGE", large)
    chosen = "but_large_twice" if algo in ("maml", "anil", "maml_pp") else "always"
    found: list[Any] = []
    for batching in ("loop", "vmap"):
        setup = setup_of(
            *IMAGES, f"algo={algo}", f"engine.batching={batching}", f"engine.compile={compile_}"
        )
        assert setup.plan.fused_norm == (chosen if batching == "loop" else "never")
        meta = stirred(setup)
        for _ in range(3):  # recorded, and replayed
            grads, _ = setup.gradient(meta, setup.train_tasks.sample(0, 2))
        constants = {name: value.detach() for name, value in meta.items()}
        losses = setup.trace(constants, setup.source.sample("val", 0, 2)).query_loss
        found.append((grads, losses))
    (grads, losses), (others, other_losses) = found
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses, other_losses, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "when"),
    [
        (("engine.compile=replay",), "but_large_twice"),
        (("engine.compile=replay", "algo.order=1"), "always"),
        (("engine.compile=inductor",), "never"),
        (("engine.gradient=mixed",), "never"),
        (("engine.gradient=implicit",), "never"),
        (("engine.gradient=evolution",), "never"),
        (("algo=anil", "inner_opt=newton"), "never"),
        (("trainer.steps=600",), "evaluation"),  # long enough to be compiled
        (("engine.batching=vmap",), "never"),
    ],
)
def test_it_is_chosen_where_derivatives_end_with_the_second(
    settings: tuple[str, ...], when: str
) -> None:
    setup = setup_of(*IMAGES, *settings)
    assert setup.plan.fused_norm == when
    norms = [layer for layer in setup.model.modules() if isinstance(layer, BatchNorm)]
    assert {layer.fused for layer in norms} == {when}
