"""The residual network of twelve layers (Oreshkin et al. 2018, Lee et al. 2019)."""

from collections import OrderedDict
from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.images import WithHead, draw_for_relu, image_size
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import MOST_UNITS, at_least, between, one_each
from metarun.config.component import builds, settings

BLOCKS = 4
SLOPE = 0.1  # of LeakyReLU below zero
DROPS_BLOCKS = 2  # the last blocks, which drop squares and not single units


@settings
class Resnet12Config(NormalisedConfig):
    """ResNet-12 (Oreshkin et al. 2018; Lee et al. 2019): four residual blocks of three."""

    widths: list[int] = field(default_factory=lambda: [64, 160, 320, 640])  # channels of each block
    features: Literal["mean", "flatten"] = "mean"  # of the last maps; MetaOptNet: flatten
    drop: float = 0.0  # rate of dropout: units in blocks 1 and 2, squares in 3 and 4
    drop_size: int = 5  # side of these squares

    def __post_init__(self) -> None:
        super().__post_init__()
        one_each("backbone.widths", self.widths, "block", BLOCKS, MOST_UNITS)
        between("backbone.drop", self.drop, 0, 0.99)
        at_least("backbone.drop_size", self.drop_size, 1)


@builds(Resnet12Config)
def resnet12(input_shape: tuple[int, ...], outputs: int, own: Resnet12Config) -> WithHead:
    """Four residual blocks of three 3×3 convolutions, each before a 2×2 max-pooling.

    Widths of 64-160-320-640 are those of TADAM, MetaOptNet and FEAT (12.42 million parameters
    without the head); 64-128-256-512 those of Meta-Baseline (8.00 million). Parameters have the
    names of these codes behind "body.", so files of their weights fit.

    With `drop`, training drops single units behind the first two blocks, and DropBlock's squares
    (Ghiasi, Lin and Le 2018) behind the last two. MetaOptNet does so with a rate of 0.1, which it
    raises from 0 over 40,000 batches; here it is the same from the first meta-step on.

    Args:
        input_shape: (channels, height, width).
        outputs: of the head.
        own: the settings.

    Raises:
        ValueError: the examples are no images, or smaller than 16×16.
    """
    channels, height, breadth = image_size("resnet12", input_shape, smallest=2**BLOCKS)
    layers = [
        (
            f"layer{i + 1}",
            nn.Sequential(_Block(before, after, _drop(own, squares=i >= BLOCKS - DROPS_BLOCKS))),
        )
        for i, (before, after) in enumerate(zip([channels, *own.widths], own.widths, strict=False))
    ]
    body = draw_for_relu(nn.Sequential(OrderedDict(layers)))
    flatten, units = own.features == "flatten", (height >> BLOCKS) * (breadth >> BLOCKS)
    return WithHead(body, own.widths[-1] * (units if flatten else 1), outputs, flatten)


class _Block(nn.Module):
    """Three convolutions beside a 1×1 one, LeakyReLU, 2×2 max-pooling, dropout."""

    def __init__(self, before: int, after: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, after, 3), BatchNorm(after)
        self.conv2, self.bn2 = _conv(after, after, 3), BatchNorm(after)
        self.conv3, self.bn3 = _conv(after, after, 3), BatchNorm(after)
        self.downsample = nn.Sequential(_conv(before, after, 1), BatchNorm(after))
        self.relu, self.pool, self.drop = nn.LeakyReLU(SLOPE), nn.MaxPool2d(2), drop

    def forward(self, x: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(x)))
        maps = self.relu(self.bn2(self.conv2(maps)))
        maps = self.bn3(self.conv3(maps)) + self.downsample(x)
        out: Tensor = self.drop(self.pool(self.relu(maps)))
        return out


class DropBlock(nn.Module):
    """In training, sets squares of maps to zero (Ghiasi, Lin and Le 2018, algorithm 1).

    Each place that the top left corner of a whole square may take begins one with the probability
    γ = rate / size² · units / places (equation 1), so that about `rate` of the units are dropped.
    What is left is scaled up so that the mean stays. Maps that are smaller than a square are
    dropped as a whole.
    """

    def __init__(self, rate: float, size: int) -> None:
        super().__init__()
        self.rate, self.size = rate, size

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, height, width) -> the same shape."""
        if not self.training:
            return x
        sides = [min(self.size, n) for n in x.shape[-2:]]
        places = [n - side + 1 for n, side in zip(x.shape[-2:], sides, strict=True)]
        area, units = sides[0] * sides[1], x.shape[-2] * x.shape[-1]
        gamma = self.rate / area * units / (places[0] * places[1])
        corners = torch.rand(*x.shape[:-2], *places, dtype=x.dtype, device=x.device) < gamma
        margin = (sides[1] - 1, sides[1] - 1, sides[0] - 1, sides[0] - 1)
        dropped = F.max_pool2d(F.pad(corners.to(x.dtype), margin), sides, stride=1)
        kept = 1 - dropped
        return x * kept * (kept.numel() / kept.sum().clamp(min=1))


def _drop(own: Resnet12Config, squares: bool) -> nn.Module:
    if not own.drop:
        return nn.Identity()
    return DropBlock(own.drop, own.drop_size) if squares else nn.Dropout(own.drop)


def _conv(before: int, after: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, bias=False)
