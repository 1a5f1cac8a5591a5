"""The network of R2-D2 (Bertinetto, Henriques, Torr and Vedaldi 2019)."""

from collections import OrderedDict
from dataclasses import field

import torch
from torch import Tensor, nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.images import image_size
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import MOST_UNITS, between, one_each
from metarun.config.component import builds, settings

BLOCKS = 4
SLOPE = 0.1  # of LeakyReLU below zero


@settings
class R2d2NetConfig(NormalisedConfig):
    """The four blocks of R2-D2."""

    widths: list[int] = field(default_factory=lambda: [96, 192, 384, 512])  # channels of each block
    dropout: float = 0.1  # rate behind blocks 3 and 4; on CIFAR-FS: 0.4
    last_activation: bool = True  # false: block 4 gives what it has normalised and pooled

    def __post_init__(self) -> None:
        super().__post_init__()
        one_each("backbone.widths", self.widths, "block", BLOCKS, MOST_UNITS)
        between("backbone.dropout", self.dropout, 0, 0.99)


@builds(R2d2NetConfig)
def r2d2(input_shape: tuple[int, ...], outputs: int, own: R2d2NetConfig) -> "R2D2Net":
    """The network for images of `input_shape` (channels, height, width).

    Raises:
        ValueError: the examples are no images, or smaller than 16×16.
    """
    return R2D2Net(input_shape, outputs, own)


class R2D2Net(nn.Module):
    """Blocks of convolution, batch normalisation, pooling and LeakyReLU; two of them are features.

    The features are the maps of blocks 3 and 4, flattened, side by side. As in the authors' code,
    block 4 pools with stride 1, and so do the maps of block 3 once more on their way to the
    features: 72,576 features for 84×84, 8,064 for 32×32 and 3,584 for 28×28, which are the paper's
    (section 4.2). `last_activation=False` drops the last LeakyReLU, which MetaOptNet's authors
    found to be better by a point. What draws random numbers is not recorded, so `dropout=0` is
    faster.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, own: R2d2NetConfig) -> None:
        super().__init__()
        channels, height, breadth = image_size("r2d2", input_shape, smallest=2**BLOCKS)
        blocks = []
        for i, (before, after) in enumerate(zip([channels, *own.widths], own.widths, strict=False)):
            last = i == BLOCKS - 1
            layers: list[tuple[str, nn.Module]] = [
                ("conv", nn.Conv2d(before, after, 3, padding=1)),
                ("norm", BatchNorm(after)),
                ("pool", nn.MaxPool2d(2, stride=1 if last else 2)),
            ]
            if own.last_activation or not last:
                layers.append(("relu", nn.LeakyReLU(SLOPE)))
            if i >= 2 and own.dropout:
                layers.append(("drop", nn.Dropout(own.dropout)))
            blocks.append(nn.Sequential(OrderedDict(layers)))
        self.body = nn.ModuleList(blocks)
        self.pool = nn.MaxPool2d(2, stride=1)
        units = ((height >> 3) - 1) * ((breadth >> 3) - 1)
        self.head = nn.Linear((own.widths[2] + own.widths[3]) * units, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, height, width) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, features)."""
        for block in self.body[:3]:
            x = block(x)
        return torch.cat([self.pool(x).flatten(1), self.body[3](x).flatten(1)], dim=1)
