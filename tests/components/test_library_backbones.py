"""Networks of torchvision, timm and learn2learn as backbones: what changes, and what is refused."""

import copy
import sys
from typing import Any

import learn2learn
import pytest
import timm as library
import torch
from torch import nn
from torchvision import models

from metarun.components.backbone.l2l import l2l
from metarun.components.backbone.library import replace_batch_norms
from metarun.components.backbone.norm import BatchNorm
from metarun.components.backbone.timm import timm
from metarun.components.backbone.torchvision import torchvision
from tests.setups import setup_of

GLYPHS, SMALL = (1, 28, 28), (3, 32, 32)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def without_drops(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double().train()


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_a_model_of_torchvision_computes_what_it_did(name: str) -> None:
    torch.manual_seed(0)
    theirs = without_drops(models.get_model(name, weights=None, num_classes=5))
    torch.manual_seed(0)
    ours = without_drops(torchvision(GLYPHS, 5, model=name))
    x = images(8, 1, 28, 28)
    torch.testing.assert_close(ours(x), theirs(x.expand(-1, 3, -1, -1)), rtol=1e-6, atol=1e-8)
    names = {n for n, _ in theirs.named_parameters()}
    place = ours.head_in_files
    assert {
        n.removeprefix("body.").replace("head.", place) for n, _ in ours.named_parameters()
    } == (names)
    assert not any(getattr(module, "inplace", False) for module in ours.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_a_model_of_timm_computes_what_it_did(name: str) -> None:
    options = {"img_size": 32} if "vit" in name else {}
    torch.manual_seed(0)
    theirs = without_drops(library.create_model(name, num_classes=5, **options))
    torch.manual_seed(0)
    ours: Any = without_drops(timm(SMALL, 5, model=name))
    x = images(8, *SMALL)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-8)
    assert torch.equal(ours.head(ours.features(x)), ours(x))
    normalises = any(isinstance(module, BatchNorm) for module in ours.modules())
    assert getattr(ours, "batch_norm", None) == (None if normalises else "none")


def test_batch_norms_keep_their_parameters_and_activations() -> None:
    act = library.layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    shared = nn.BatchNorm1d(4, eps=1e-2)
    model = nn.ModuleDict({"a": act, "b": shared, "c": nn.Sequential(shared)}).double().train()
    for p in model.parameters():
        nn.init.normal_(p)
    theirs = copy.deepcopy(model)
    replace_batch_norms("mine", model)
    assert all(isinstance(part, BatchNorm) for part in (model["a"], model["b"]))
    assert model["c"][0] is model["b"]  # type: ignore[index]
    x, flat = images(5, 4, 3, 3), images(5, 4)
    torch.testing.assert_close(model["a"](x), theirs["a"](x))
    torch.testing.assert_close(model["b"](flat), theirs["b"](flat))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_batch_norms_that_are_not_known_are_refused() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="its 0 is a Odd, a batch normalisation that metarun"):
        replace_batch_norms("mine", nn.Sequential(Odd(3)))
    with pytest.raises(ValueError, match="its 0 normalises batches without parameters"):
        replace_batch_norms("mine", nn.Sequential(nn.BatchNorm2d(3, affine=False)))


def test_googlenet_gives_scores_alone() -> None:
    with torch.device("meta"):
        model = torchvision(SMALL, 5, model="googlenet")
    assert model.head.out_features == 5 and "aux1" not in dict(model.body.named_children())


REFUSED = [
    (torchvision, GLYPHS, "resnt18", r"torchvision has no such model \(did you mean resnet18\?\)"),
    (torchvision, GLYPHS, "squeezenet1_0", "does not end in a linear layer, which would be its"),
    (torchvision, GLYPHS, "vit_b_32", r"cannot take examples of 28×28×1 \(Input shape indivisible"),
    (torchvision, GLYPHS, "alexnet", r"cannot take examples of 28×28×1 \(Given input size"),
    (torchvision, (2, 28, 28), "resnet18", "one or three channels, not 2: use backbone=timm"),
    (torchvision, (1,), "resnet18", r"needs images \(channels, height, width\)"),
    (timm, (1,), "resnet18", r"needs images \(channels, height, width\)"),
    (timm, GLYPHS, "test_resnett", r"timm has no such model \(did you mean test_resnet\?\)"),
    (timm, GLYPHS, "hf-hub:timm/resnet18", "timm has no such model"),
    (timm, GLYPHS, "test_vit", r"cannot take examples of 28×28×1 \(.*divisible by patch size"),
    (timm, SMALL, "deit_tiny_distilled_patch16_224", "does more with its last linear layer than"),
    (l2l, GLYPHS, "CNN3", "l2l has no such model .*: choose one of OmniglotCNN, OmniglotFC, CNN4"),
    (l2l, SMALL, "ResNet12", "use backbone=resnet12, which is the same network and takes its"),
    (l2l, SMALL, "OmniglotCNN", "cannot take examples of 32×32×3"),
    (l2l, (1, 8, 8), "CNN4", "too small for backbone=l2l, which needs 16×16 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "shape", "name", "message"), REFUSED)
def test_what_cannot_be_is_refused(make: Any, shape: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(shape, 5, model=name)


@pytest.mark.parametrize(
    ("make", "module", "message"),
    [
        (timm, "timm", r"timm, which is not installed: pip install 'metarun\[timm\]'"),
        (
            l2l,
            "learn2learn.vision",
            "learn2learn, which is not installed: .* or use backbone=conv4",
        ),
    ],
)
def test_a_library_that_is_not_installed_is_named(
    make: Any, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        make(GLYPHS, 5)


def test_images_of_other_channels_are_for_timm() -> None:
    assert timm((2, 32, 32), 5, model="test_resnet")(torch.rand(2, 2, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", ["OmniglotCNN", "CNN4"])
def test_a_network_of_learn2learn_computes_what_it_did(name: str) -> None:
    shape = GLYPHS if name == "OmniglotCNN" else SMALL
    build = getattr(learn2learn.vision.models, name)
    options = {} if name == "OmniglotCNN" else {"embedding_size": 256}
    torch.manual_seed(0)
    theirs = build(5, **options).double().train()
    torch.manual_seed(0)
    ours = l2l(shape, 5, model=name).double()
    x = images(6, *shape)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


SETTINGS = ("data=glyphs", "task.way=3", "task.query=2", "trainer.meta_batch=2")


@pytest.mark.parametrize("name", ["test_efficientnet_ln", "test_efficientnet"])
def test_models_without_and_with_activations_in_their_norms_are_meta_learned(name: str) -> None:
    """In second order, by vmap and in a loop."""
    found = []
    for batching in ("loop", "vmap"):
        setup = setup_of(
            *SETTINGS, "backbone=timm", f"backbone.model={name}", f"engine.batching={batching}",
            "engine.precision=float64", "engine.compile=none", "algo.order=2",
        )  # fmt: skip
        meta = {n: v.requires_grad_() for n, v in setup.algorithm.init().items()}
        grads, _ = setup.gradient(meta, setup.train_tasks.sample(0, 2))
        found.append(torch.cat([grad.flatten() for grad in grads.values()]))
        assert setup.batch_norm == ("none" if "ln" in name else "batch statistics (transductive)")
    looped, mapped = found
    assert looped.isfinite().all() and (looped - mapped).norm() < 1e-8 * looped.norm()


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize(
    "backbone", [("resnet12", "backbone.drop=0.3"), ("r2d2", "backbone.dropout=0.4")]
)
def test_dropout_is_drawn_anew_for_each_task_and_step(
    backbone: tuple[str, str], batching: str
) -> None:
    """An evaluation drops nothing."""
    setup = setup_of(
        *SETTINGS, f"backbone={backbone[0]}", backbone[1], "backbone.widths=[3,3,4,4]",
        "algo=protonet", f"engine.batching={batching}",
    )  # fmt: skip
    meta = {n: v.requires_grad_() for n, v in setup.algorithm.init().items()}
    task = setup.train_tasks.sample(0, 1)
    twice = type(task)(*(torch.cat([part, part]) for part in task))
    losses = [float(setup.gradient(meta, tasks)[1].loss) for tasks in [twice, task] * 3]
    assert len(set(losses)) == 6
    with torch.no_grad():
        traces = [setup.trace(meta, task).query_loss for _ in range(2)]
    assert torch.equal(*traces)
