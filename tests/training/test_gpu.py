"""The same on a GPU. Skipped, saying so, where there is none."""

import gc
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.maml import maml
from metarun.components.backbone.conv4 import Conv4
from metarun.episodes import store as store_module
from metarun.episodes.source import Episodes, ImageEpisodes
from metarun.episodes.store import from_equal_classes, select_classes
from metarun.rundir import checkpoint
from metarun.training.loop import meta_step
from metarun.training.setup import build
from metarun.training.state import fresh
from metarun.unroll import CaptureError, launched_together, meta_gradient, sgd, unroll
from tests.conftest import Metarun
from tests.setups import config_of
from tests.simulated.cases import cases
from tests.simulated.catalogue import AROUND, UNCOMPARED, small
from tests.simulated.graphs import figures, heard, recorded_cases

pytestmark = pytest.mark.gpu

CATALOGUE = [case for case in cases() if case.endswith((" recorded", " loop", "on the CPU"))]
SOLVERS = [f"algo={name} recorded" for name in ("dkt", "imaml", "metaoptnet", "r2d2", "sharp_maml")]
GRAPHS = [*SOLVERS, *(case for case in recorded_cases() if case.startswith("more: "))]
COPIES = ("algo=reptile loop",)  # numbers of examples: see test_simulated_accelerator.py


@pytest.mark.parametrize("case", [case for case in CATALOGUE if case not in COPIES])
def test_no_meta_step_waits_for_it(case: str) -> None:
    """As far as torch knows; after the first ones, which try things out and record."""
    with small(), UNCOMPARED, AROUND.get(case, nullcontext()):
        setup = build(config_of(*cases()[case]), torch.device("cuda"))
        state = fresh(setup)
        for mode in ("default", "default", "error") if setup.steps else ():
            torch.cuda.set_sync_debug_mode(mode)
            try:
                meta_step(setup, state)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", GRAPHS)
def test_a_meta_step_that_is_one_cuda_graph_has_the_same_bits(case: str) -> None:
    """Newton's looks at eigenvalues, and is replayed."""
    settings, device = recorded_cases()[case], torch.device("cuda")
    with small(), heard() as said:
        ours = figures(settings, device)
    assert any("not launched" in line for line in said) == (case == "more: newton"), said
    with small():
        theirs = figures((*settings, "engine.cuda_graphs=false"), device)
    assert all(map(torch.equal, ours, theirs))


def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    x = torch.ones(3, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(CaptureError):
        launched_together(lambda x: [x + x.sum().item()], [x])
    assert torch.cuda.current_stream() == before
    double = launched_together(lambda x: [2 * x], [x])
    assert double(x + 1)[0].tolist() == [4.0] * 3


def test_a_graph_works_on_when_others_are_gone() -> None:
    """Also those whose products took a workspace of cuBLAS on the same stream."""
    x = torch.rand(64, 4096, device="cuda")
    product, other = (launched_together(lambda x: [x @ x.T], [x]) for _ in range(2))
    expected = product(x)[0]
    del other
    gc.collect()
    torch.cuda.empty_cache()
    filled = torch.full((2**26,), torch.nan, device="cuda")  # over what was given back
    assert torch.equal(product(x)[0], expected) and filled.isnan().all()


def test_garbage_is_no_trouble_to_a_capture() -> None:
    x = torch.ones(3, device="cuda")
    holder = [launched_together(lambda x: [x + 1], [x])]
    holder.append(holder)  # type: ignore[arg-type]
    del holder
    assert launched_together(lambda x: [x + 2], [x])(x)[0].tolist() == [3.0] * 3


@pytest.mark.parametrize("fits", [True, False])
def test_episodes_are_those_of_the_cpu(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the images have moved to the GPU, or what is drawn does."""
    if not fits:
        monkeypatch.setattr(store_module, "free_memory", lambda device: 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 6, 1, 4, 4), dtype=torch.uint8, generator=generator)
    store = from_equal_classes(images, [str(c) for c in range(20)])
    splits = {"train": select_classes(store, range(9)), "val": select_classes(store, range(9, 20))}
    drawn = []
    for device in ("cpu", "cuda"):
        own = ImageEpisodes(
            splits, way=5, shot=1, query=2, seed=3, device=torch.device(device)
        )  # fmt: skip
        drawn.append([part for split in splits for part in own.sample(split, 5, 7)])
    kept = {s.images.untyped_storage().data_ptr() for s in own.stores.values()}
    assert len(kept) == 1 and own.stores["val"].images.is_cuda == fits
    for a, b in zip(*drawn, strict=True):
        assert b.is_cuda and torch.equal(a, b.cpu())


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_the_meta_gradient_is_that_of_the_cpu(batching: str, gradient: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 10, 1, 28, 28, dtype=torch.float64)
    labels = torch.arange(5).repeat(2).expand(3, 10)
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = Conv4((1, 28, 28), 5, width=8).double().to(device)
        mode = gradient if device == "cuda" else "reverse"
        inner = InnerLoop(sgd(0.4), (), "global", {}, mode)
        algorithm = maml(Problem(model, OBJECTIVES["classification"], inner, 5), inner_steps=2)
        meta = {k: v.requires_grad_() for k, v in algorithm.init().items()}
        x, y = images.to(device), labels.to(device)
        grads, _ = meta_gradient(algorithm.loss, meta, Episodes(x, y, x, y), batching)
        gradients.append(torch.cat([g.flatten().cpu() for g in grads.values()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[0].norm()


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed"])
def test_recomputing_draws_the_same_dropout_masks(gradient: str) -> None:
    def result(mode: str) -> torch.Tensor:
        torch.manual_seed(0)
        w = torch.ones(1000, dtype=torch.float64, device="cuda", requires_grad=True)
        end = unroll(
            lambda p, step: torch.nn.functional.dropout(p["w"]).pow(2).sum(),
            {"w": w},
            sgd(0.1),
            4,
            gradient=mode,
        )
        return torch.autograd.grad(end.params["w"].pow(2).sum(), w)[0]

    torch.testing.assert_close(result(gradient), result("reverse"), rtol=1e-12, atol=0)


def test_a_run_on_the_gpu_gives_the_same_bits_twice(metarun: Metarun, tmp_path: Path) -> None:
    for name in ("a", "b"):
        metarun(
            "train", "device=cuda", "trainer.steps=20", "trainer.eval_episodes=20",
            "trainer.test_episodes=20", f"hydra.run.dir={name}",
        )  # fmt: skip
    a, b = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.safetensors")["meta"]
        for name in "ab"
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((tmp_path / "a" / "result.json").read_text())["peak_memory_gib"] > 0
