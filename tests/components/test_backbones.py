"""Networks: sizes, shapes, parity of the batch normalisation."""

from typing import Any

import learn2learn as l2l
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from metarun.components.backbone.conv4 import Conv4, Conv4Config, conv4
from metarun.components.backbone.mlp import MLP, mlp
from metarun.components.backbone.norm import BatchNorm
from metarun.errors import ConfigError


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_omniglot_network_has_the_size_of_the_published_one() -> None:
    assert count(Conv4((1, 28, 28), 5)) == 112_261
    assert count(Conv4((1, 28, 28), 5)) == count(l2l.vision.models.OmniglotCNN(5))


def test_the_max_pool_network_has_the_size_of_the_published_one() -> None:
    assert count(Conv4((3, 84, 84), 5, width=64, pool="max")) == 121_093
    assert count(l2l.vision.models.CNN4(5, hidden_size=64, embedding_size=1600)) == 121_093
    assert count(Conv4((3, 84, 84), 5, width=32, pool="max")) == 32_901


@pytest.mark.parametrize("pool", ["stride", "max"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84), (3, 33, 20)])
def test_conv4_maps_images_to_scores(shape: tuple[int, ...], pool: str) -> None:
    model = Conv4(shape, 7, width=4, pool=pool)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert {n.split(".")[0] for n, _ in model.named_parameters()} == {"body", "head"}


def test_conv4_refuses_what_is_no_image_or_too_small() -> None:
    with pytest.raises(ValueError, match="backbone=mlp"):
        Conv4((1,), 1)
    with pytest.raises(ValueError, match="too small"):
        Conv4((1, 8, 8), 5, pool="max")


def test_mlp_has_the_layers_asked_for() -> None:
    assert count(mlp((1,), 1)) == 1 * 40 + 40 + 40 * 40 + 40 + 40 + 1
    assert MLP((2, 3), 4, hidden=())(torch.rand(5, 2, 3)).shape == (5, 4)


def test_batch_norm_computes_what_torch_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    ours, theirs = BatchNorm(4).double(), nn.BatchNorm2d(4, track_running_stats=False).double()
    for module in (ours, theirs):
        torch.manual_seed(1)
        nn.init.uniform_(module.weight)
        nn.init.uniform_(module.bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    flat = torch.randn(7, 4, dtype=torch.float64)  # of no image
    theirs_too = nn.BatchNorm1d(4, track_running_stats=False).double()
    theirs_too.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(flat), theirs_too(flat), rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    slopes = [  # through mean and deviation too
        torch.autograd.grad(module(x).pow(3).sin().sum(), [x, *module.parameters()])
        for module in (ours, theirs)
    ]
    for own, other in zip(*slopes, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


def test_second_derivatives_of_batch_norm_are_right_around_vmap() -> None:
    """What torch's fused operation gets wrong: autograd around a vmap of inner steps."""
    torch.manual_seed(0)
    model = nn.Sequential(BatchNorm(3), nn.Tanh(), nn.Conv2d(3, 2, 3), BatchNorm(2)).double()
    params = {k: v.detach().requires_grad_() for k, v in model.named_parameters()}
    x = torch.randn(4, 5, 3, 6, 6, dtype=torch.float64)

    def meta(params: dict, images: torch.Tensor) -> torch.Tensor:
        loss = lambda p: torch.func.functional_call(model, p, (images,)).pow(3).sin().sum()  # noqa: E731
        inner = grad(loss)(params)
        return loss({k: v - 0.1 * inner[k] for k, v in params.items()})

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(params.values()))])

    mapped = gradient(vmap(meta, in_dims=(None, 0))(params, x).sum())
    looped = gradient(sum(meta(params, images) for images in x))
    # All parameters together: a bias before a normalisation has gradient zero, but noise.
    assert (mapped - looped).norm() < 1e-10 * looped.norm()


def normalised(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """By mean and variance of each channel over the batch at hand."""
    return F.batch_norm(maps, None, None, weight, bias, training=True)


@pytest.mark.parametrize("pool", ["stride", "max"])
def test_conv4_computes_what_is_written_out_here(pool: str) -> None:
    """Convolution, normalisation, ReLU and pooling, in this order, then the head."""
    torch.manual_seed(0)
    model = Conv4((2, 33, 20), 3, width=5, pool=pool).double()
    p = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    x = maps = torch.rand(4, 2, 33, 20, dtype=torch.float64)
    for i in range(4):
        conv, norm = f"body.{i}.conv", f"body.{i}.norm"
        stride = 2 if pool == "stride" else 1
        maps = F.conv2d(maps, p[f"{conv}.weight"], p[f"{conv}.bias"], stride, padding=1)
        maps = normalised(maps, p[f"{norm}.weight"], p[f"{norm}.bias"]).clamp(min=0)
        maps = F.max_pool2d(maps, 2) if pool == "max" else maps
    features = maps.flatten(2).mean(2) if pool == "stride" else maps.flatten(1)
    expected = features @ p["head.weight"].T + p["head.bias"]
    ours = torch.func.functional_call(model, p, (x,))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def written_out(own: Conv4Config, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Scores of conv4 in plain operations, padded as TensorFlow documents it."""
    for i in range(4):
        w, b = p[f"body.{i}.conv.weight"], p[f"body.{i}.conv.bias"]
        stride = 2 if own.pool == "stride" else 1
        pads = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // stride) - 1) * stride + 3 - n, 0) if own.padding == "same" else 2
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), w, b, stride)
        same = own.padding == "same"
        if own.order == "pool_norm_relu":
            x = F.max_pool2d(x, 2, ceil_mode=same)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (var + own.norm_eps).sqrt()[:, None, None]
        if own.norm_gain:
            x = x * p[f"body.{i}.norm.weight"][:, None, None]
        x = (x + p[f"body.{i}.norm.bias"][:, None, None]).relu()
        if own.pool == "max" and own.order == "norm_relu_pool":
            x = F.max_pool2d(x, 2, ceil_mode=same)
    mean_wanted = own.features == "mean" if own.features else own.pool == "stride"
    features = x.mean((2, 3)) if mean_wanted else x.flatten(1)
    return features @ p["head.weight"].T + p["head.bias"]


VARIANTS: list[dict[str, Any]] = [
    {"padding": "same"},
    {"padding": "same", "pool": "max"},
    {"features": "flatten"},
    {"pool": "max", "features": "mean"},
    {"pool": "max", "order": "pool_norm_relu", "padding": "same"},
    {"widths": [3, 4, 5, 6], "norm_gain": False, "norm_eps": 1e-3},
]


@pytest.mark.parametrize("own", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 33, 20)])
def test_each_variant_of_conv4_computes_what_is_written_out(
    own: dict[str, Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    settings = Conv4Config(**{"width": 3, **own})
    model = conv4(shape, 4, settings).double()
    p = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    x = torch.rand(5, *shape, dtype=torch.float64)
    ours = torch.func.functional_call(model, p, (x,))
    torch.testing.assert_close(ours, written_out(settings, p, x), rtol=1e-9, atol=1e-9)


def test_variants_of_conv4_have_the_sizes_of_the_published_ones() -> None:
    reptile = conv4((1, 28, 28), 5, padding="same", features="flatten")
    assert reptile.head.in_features == 256
    mini = conv4((3, 84, 84), 5, width=32, pool="max", padding="same", order="pool_norm_relu")
    assert mini.head.in_features == 1152
    assert count(conv4((3, 84, 84), 5, widths=[64, 96, 128, 256], pool="max")) == 496_165
    assert count(conv4((3, 84, 84), 5, width=64, pool="max", features="mean")) == 113_413


def test_pooling_before_or_behind_a_relu_is_the_same_function() -> None:
    """So it is no setting: values and gradients agree."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    before, behind = F.max_pool2d(x, 2).relu(), F.max_pool2d(x.relu(), 2)
    assert torch.equal(before, behind)
    assert all(
        torch.equal(*pair)
        for pair in zip(
            torch.autograd.grad(before.sin().sum(), x),
            torch.autograd.grad(behind.sin().sum(), x),
            strict=True,
        )
    )


def test_conv4_draws_as_mamls_code_does() -> None:
    torch.manual_seed(0)
    model = conv4((1, 28, 28), 200, init="maml")
    for name, value in model.named_parameters():
        assert not name.endswith("bias") or not value.any()
    assert float(model.head.weight.detach().std()) == pytest.approx(1, abs=0.05)
    inner = model.body[1][0].weight
    limit = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert 0.97 * limit < inner.abs().max() <= limit
    flat = conv4((3, 84, 84), 5, pool="max", width=32, init="maml").head.weight
    assert 0.97 < flat.abs().max() / (6 / (800 + 5)) ** 0.5 <= 1


def test_other_settings_of_conv4_draw_the_same_weights() -> None:
    """What is drawn, and in which order, is not to change."""
    models = []
    for own in ({}, {"padding": "same"}, {"widths": [5, 5, 5, 5]}):
        torch.manual_seed(0)
        models.append(dict(conv4((1, 28, 28), 5, width=5, **own).named_parameters()))
    for other in models[1:]:
        assert all(torch.equal(value, other[name]) for name, value in models[0].items())


@pytest.mark.parametrize(
    "wrong", [{"widths": [3, 4]}, {"widths": [3, 4, 5, 0]}, {"order": "pool_norm_relu"}]
)
def test_conv4_refuses_settings_that_contradict(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.(widths|order)"):
        Conv4Config(**wrong)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 4)])
def test_mlp_computes_what_is_written_out_here(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = MLP((2, 3), 4, hidden).double()
    p = dict(model.named_parameters())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    units = x.flatten(1)
    for i in range(len(hidden)):
        weight, bias = p[f"body.{2 * i}.weight"], p[f"body.{2 * i}.bias"]
        units = (units @ weight.T + bias).clamp(min=0)
    expected = units @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
