"""Residual networks of basic blocks (He et al. 2016), as few-shot codes build them."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.images import WithHead, draw_for_relu, image_size
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import builds, settings

STAGES = 4


@settings
class Resnet18Config(NormalisedConfig):
    """ResNet-18 (He et al. 2016): eight residual blocks."""

    width: int = 64  # channels of the first of four stages; each next one has twice as many
    stem: Literal["small", "imagenet"] = "small"  # small: 3×3; imagenet: 7×7 of stride 2, pooling

    def __post_init__(self) -> None:
        super().__post_init__()
        between("backbone.width", self.width, 1, MOST_UNITS)


@builds(Resnet18Config)
def resnet18(input_shape: tuple[int, ...], outputs: int, own: Resnet18Config) -> WithHead:
    """Four stages of two basic blocks, a mean over space, and a linear head.

    The stem "small" is a 3×3 convolution, for images of up to 84 pixels a side. With "imagenet" it
    is torchvision's. Parameters have torchvision's names behind "body.", so files of its weights
    fit the stem "imagenet" on images of three channels.

    Args:
        input_shape: (channels, height, width).
        outputs: of the head.
        own: the settings.
    """
    return residual("resnet18", input_shape, outputs, own, blocks=2)


def residual(
    name: str, input_shape: tuple[int, ...], outputs: int, own: Resnet18Config, blocks: int
) -> WithHead:
    """A residual network with so many basic blocks in each of four stages.

    Raises:
        ValueError: the examples are no images.
    """
    channels, *_ = image_size(name, input_shape)
    width = own.width
    layers: list[tuple[str, nn.Module]]
    if own.stem == "small":
        layers = [("conv1", _conv(channels, width, 3))]
    else:
        layers = [("conv1", _conv(channels, width, 7, 2))]
    layers += [("bn1", BatchNorm(width)), ("relu", nn.ReLU())]
    if own.stem == "imagenet":
        layers.append(("maxpool", nn.MaxPool2d(3, stride=2, padding=1)))
    before = width
    for stage in range(STAGES):
        after, parts = width * 2**stage, []
        for block in range(blocks):
            parts.append(_Basic(before, after, 2 if stage and not block else 1))
            before = after
        layers.append((f"layer{stage + 1}", nn.Sequential(*parts)))
    body = draw_for_relu(nn.Sequential(OrderedDict(layers)))
    return WithHead(body, before, outputs)


class _Basic(nn.Module):
    """Two 3×3 convolutions beside what they get, which a 1×1 one fits where shapes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(before, after, 3, stride), BatchNorm(after)
        self.conv2, self.bn2 = _conv(after, after, 3), BatchNorm(after)
        self.relu = nn.ReLU()
        fits = stride == 1 and before == after
        shortcut = [] if fits else [_conv(before, after, 1, stride), BatchNorm(after)]
        self.downsample = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(maps + self.downsample(x))
        return out


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
