"""The residual networks and R2-D2's, against the codes whose names and weights they share."""

from collections.abc import Callable
from typing import Any

import easyfsl.modules as easyfsl
import learn2learn as l2l
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from metarun.components.backbone.mlp_bn import mlp_bn
from metarun.components.backbone.r2d2 import r2d2
from metarun.components.backbone.resnet10 import resnet10
from metarun.components.backbone.resnet12 import DropBlock, resnet12
from metarun.components.backbone.resnet18 import resnet18
from metarun.components.backbone.wrn28_10 import wrn28_10
from metarun.errors import ConfigError

META = torch.device("meta")
SMALL, TINY = (3, 32, 32), (3, 16, 16)


def count(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64, with gains and biases that are not the first ones."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model.double()


def agree(ours: Any, theirs: nn.Module, x: Tensor) -> None:
    """Features of batch statistics, and their gradients, with the same weights."""
    stirred(theirs).train()
    own = {n: p for n, p in ours.state_dict().items() if not n.startswith("head.")}
    given = {f"body.{n}": p for n, p in theirs.named_parameters() if not n.startswith("fc.")}
    assert own.keys() == given.keys()
    ours.load_state_dict(given, strict=False, assign=True)
    x.requires_grad_()
    found, expected = ours.features(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    slopes = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-8)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def imagenet18() -> nn.Module:
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Identity()
    return model


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module]]] = {
    "resnet12": (lambda: resnet12(SMALL, 5), easyfsl.feat_resnet12),
    "resnet10": (lambda: resnet10(TINY, 5), easyfsl.resnet10),
    "resnet18": (lambda: resnet18(TINY, 5), easyfsl.resnet18),
    "torchvision": (lambda: resnet18(SMALL, 5, stem="imagenet"), imagenet18),
}


@pytest.mark.parametrize("name", PAIRS)
def test_features_are_those_of_the_reference_code_with_the_same_weights(name: str) -> None:
    torch.manual_seed(0)
    make, theirs = PAIRS[name]
    with META:
        ours = make()
    agree(ours, theirs(), images(4, *(TINY if name in ("resnet10", "resnet18") else SMALL)))


def test_wrn_features_are_those_of_feats_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs takes 84×84 images alone; its last pooling is the mean over all places."""
    torch.manual_seed(0)
    theirs = l2l.vision.models.wrn28.WideResNet(28, 2, 0.0)
    pool = F.avg_pool2d
    monkeypatch.setattr(F, "avg_pool2d", lambda x, size: pool(x, x.shape[-1]))
    with META:
        ours = wrn28_10((3, 16, 16), 5, widen=2)
    agree(ours, theirs, images(4, 3, 16, 16))


def test_convolutions_are_drawn_for_relu_by_their_outputs() -> None:
    torch.manual_seed(0)
    weight = resnet12((3, 16, 16), 5, widths=[16, 64, 8, 8]).get_parameter(
        "body.layer2.0.conv1.weight"
    )
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_sizes_are_the_published_ones() -> None:
    with META:
        assert count(resnet12((3, 84, 84), 5)) == 12_424_320
        assert count(resnet12((3, 84, 84), 5, widths=[64, 128, 256, 512])) == 7_996_800
        assert resnet12((3, 84, 84), 5, features="flatten").head.in_features == 16_000
        assert count(wrn28_10((3, 84, 84), 5)) == 36_482_880
        assert count(resnet18((3, 224, 224), 5, stem="imagenet")) == 11_689_512 - 513_000
        fiveai = easyfsl.resnet10(big_kernel=True)
        ours = count(resnet10((3, 224, 224), 5, stem="imagenet"))
        assert ours == count(fiveai) - count(fiveai.fc) == 4_905_792
        for side, features in ((84, 72_576), (32, 8_064), (28, 3_584)):
            assert r2d2((3, side, side), 5).head.in_features == features
        fully = mlp_bn((1, 28, 28), 5)
    assert count(fully) + 64 * 5 + 5 == 247_621
    assert count(fully) == count(l2l.vision.models.OmniglotFC(784, 5).features)


def test_mlp_bn_computes_what_learn2learns_network_does() -> None:
    theirs = stirred(l2l.vision.models.OmniglotFC(784, 5, sizes=[8, 7])).train()
    ours = mlp_bn((1, 28, 28), 5, hidden=[8, 7], norm_eps=1e-3).double()
    given = zip(ours.state_dict(), theirs.state_dict().values(), strict=False)
    names = {n.replace("normalize", "norm"): p for n, p in theirs.named_parameters()}
    renamed = {
        n.replace("features.1.", "body.").replace("classifier", "head"): p for n, p in names.items()
    }
    assert len(list(given)) == len(renamed)
    ours.load_state_dict(renamed)
    x = images(6, 1, 28, 28)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_mlp_bn_draws_as_mamls_code_does() -> None:
    torch.manual_seed(0)
    for name, p in mlp_bn((1, 28, 28), 5, init="maml").named_parameters():
        if name.endswith("weight") and p.dim() == 2:
            assert p.abs().max() <= 0.02
            assert float(p.detach().std()) == pytest.approx(0.0088, rel=0.1)  # σ within 2σ
        elif name.endswith("bias"):
            assert not p.any()


@pytest.mark.parametrize("last", [True, False])
def test_r2d2_computes_what_is_written_out_here(last: bool) -> None:
    torch.manual_seed(0)
    model = stirred(r2d2((2, 20, 28), 3, widths=[3, 4, 5, 6], last_activation=last)).eval()
    p, x = dict(model.named_parameters()), images(4, 2, 20, 28)
    kept = []
    for i in range(4):
        x = F.conv2d(x, p[f"body.{i}.conv.weight"], p[f"body.{i}.conv.bias"], padding=1)
        x = F.batch_norm(
            x, None, None, p[f"body.{i}.norm.weight"], p[f"body.{i}.norm.bias"], training=True
        )
        x = F.max_pool2d(x, 2, stride=1 if i == 3 else 2)
        x = torch.where(x > 0, x, 0.1 * x) if last or i < 3 else x
        kept.append(x)
    features = torch.cat([F.max_pool2d(kept[2], 2, 1).flatten(1), kept[3].flatten(1)], 1)
    expected = features @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(
        torch.func.functional_call(model, {}, (images(4, 2, 20, 28),)), expected
    )


def test_r2d2_drops_behind_its_last_two_blocks() -> None:
    model = r2d2((1, 28, 28), 3, widths=[8, 8, 200, 200], dropout=0.4)
    x = torch.rand(4, 1, 28, 28)
    zero = (model.features(x) == 0).float()
    assert zero[:, 800:].mean() == pytest.approx(0.4, abs=0.05)
    # A pooled square of block 3 is zero if all four units are dropped.
    assert zero[:, :800].mean() == pytest.approx(0.4**4, abs=0.02)
    assert (model.eval().features(x) == 0).float().mean() < 0.01


def test_drop_block_drops_whole_squares_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, x = DropBlock(0.2, 3), torch.ones(200, 10, 9, 9)
    out = layer(x)
    dropped = out == 0
    gamma = 0.2 / 9 * 81 / 49
    ways = F.conv_transpose2d(torch.ones(1, 1, 7, 7), torch.ones(1, 1, 3, 3))  # to be dropped
    expected = float((1 - (1 - gamma) ** ways).mean())  # squares overlap
    assert dropped.float().mean() == pytest.approx(expected, rel=0.03)
    assert float(out.mean()) == pytest.approx(1, abs=1e-5)
    # Each dropped unit lies in a square of dropped ones.
    kept = F.max_pool2d((~dropped).float(), 3, stride=1)  # 0: a square without a kept unit
    squares = F.max_pool2d(F.pad(1 - kept, (2, 2, 2, 2)), 3, stride=1)
    assert torch.equal(squares.bool(), dropped)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_drop_block_drops_small_maps_as_a_whole(side: int) -> None:
    torch.manual_seed(0)
    out = DropBlock(0.1, 5)(torch.ones(2000, 4, side, side)).flatten(2)
    assert ((out == 0).all(2) | (out != 0).all(2)).all()
    assert (out == 0).float().mean() == pytest.approx(0.1, abs=0.02)
    assert DropBlock(0.99, 5)(torch.ones(1, 1, side, side)).isfinite().all()


def test_resnet12_drops_units_first_and_squares_later() -> None:
    model = resnet12((3, 84, 84), 5, widths=[2, 2, 2, 2], drop=0.1)
    kinds = [type(block[0].drop) for block in model.body]  # type: ignore[index,union-attr]
    assert kinds == [nn.Dropout, nn.Dropout, DropBlock, DropBlock]


@pytest.mark.parametrize("make", [resnet12, resnet10, resnet18, wrn28_10, r2d2])
def test_what_is_no_image_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="use backbone=mlp"):
        make((4,), 5)


@pytest.mark.parametrize("make", [resnet12, r2d2])
def test_images_that_are_too_small_are_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"8×20 are too small .* needs 16×16 or more: use"):
        make((1, 8, 20), 5)
    make((1, 16, 17), 5)(torch.rand(2, 1, 16, 17))


@pytest.mark.parametrize("make", [resnet12, r2d2])
def test_widths_are_four(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="must have 4 numbers, one a block"):
        make((1, 28, 28), 5, widths=[3, 4])


def test_features_of_resnet12_are_the_mean_or_all_of_the_last_maps() -> None:
    models = []
    for features in ("mean", "flatten"):
        torch.manual_seed(0)
        models.append(resnet12((3, 32, 48), 5, widths=[2, 2, 3, 4], features=features).double())
    mean, flat = (model.features(images(3, 3, 32, 48)) for model in models)
    assert flat.shape == (3, 4 * 2 * 3) and models[1](images(3, 3, 32, 48)).shape == (3, 5)
    torch.testing.assert_close(flat.unflatten(1, (4, 6)).mean(2), mean)
