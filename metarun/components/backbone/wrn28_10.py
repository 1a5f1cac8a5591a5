"""The wide residual network WRN-28-10 (Zagoruyko and Komodakis 2016; LEO, FEAT)."""

from collections import OrderedDict

from torch import Tensor, nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.images import WithHead, draw_for_relu, image_size
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import between
from metarun.config.component import builds, settings

FIRST = 16  # channels of the first convolution
BLOCKS = 4  # of each of three stages: 28 = 6·4 + 4 layers


@settings
class Wrn2810Config(NormalisedConfig):
    """WRN-28-10 (Zagoruyko and Komodakis 2016): a wide residual network."""

    widen: int = 10  # factor of the channels 16, 32 and 64 of the three stages
    dropout: float = 0.0  # rate between the two convolutions of a block

    def __post_init__(self) -> None:
        super().__post_init__()
        between("backbone.widen", self.widen, 1, 1000)
        between("backbone.dropout", self.dropout, 0, 0.99)


@builds(Wrn2810Config)
def wrn28_10(input_shape: tuple[int, ...], outputs: int, own: Wrn2810Config) -> WithHead:
    """Three stages of four blocks that normalise first, a mean over space, and a linear head.

    As in FEAT's code, convolutions have biases and a block strides in its second one: 36.48
    million parameters without the head. Parameters have the names of that code behind "body.".

    Args:
        input_shape: (channels, height, width).
        outputs: of the head.
        own: the settings.

    Raises:
        ValueError: the examples are no images.
    """
    channels, *_ = image_size("wrn28_10", input_shape)
    layers: list[tuple[str, nn.Module]] = [("conv1", _conv(channels, FIRST, 3))]
    before = FIRST
    for stage in range(3):
        after, parts = FIRST * 2**stage * own.widen, []
        for block in range(BLOCKS):
            parts.append(_Wide(before, after, 2 if stage and not block else 1, own.dropout))
            before = after
        layers.append((f"layer{stage + 1}", nn.Sequential(*parts)))
    layers += [("bn1", BatchNorm(before)), ("relu", nn.ReLU())]
    return WithHead(draw_for_relu(nn.Sequential(OrderedDict(layers))), before, outputs)


class _Wide(nn.Module):
    """Normalisation, ReLU and convolution, twice, beside what they get."""

    def __init__(self, before: int, after: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = BatchNorm(before), _conv(before, after, 3)
        self.bn2, self.conv2 = BatchNorm(after), _conv(after, after, 3, stride)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(dropout)
        fits = stride == 1 and before == after
        self.shortcut = nn.Sequential(*([] if fits else [_conv(before, after, 1, stride)]))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.dropout(self.conv1(self.relu(self.bn1(x))))
        out: Tensor = self.conv2(self.relu(self.bn2(maps))) + self.shortcut(x)
        return out


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride=stride, padding=size // 2)
