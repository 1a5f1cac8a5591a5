"""The four-block convolutional network of the few-shot literature."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import MOST_UNITS, between, positive
from metarun.config.component import builds, settings
from metarun.config.run import Norm


@settings
class Conv4Config:
    """Four convolution blocks."""

    width: int = 64  # channels of each block
    pool: Literal["stride", "max"] = "stride"  # stride: 2 in each convolution; max: 2×2 pooling
    norm: Norm = "transductive"  # whose moments normalise the queries of a task
    norm_eps: float = 1e-5  # added to the variance; MAML's reference code: 1e-3
    norm_gain: bool = True  # scale what is normalised by a learned γ; MAML's reference code: false

    def __post_init__(self) -> None:
        between("backbone.width", self.width, 1, MOST_UNITS)
        positive("backbone.norm_eps", self.norm_eps)


@builds(Conv4Config)
def conv4(input_shape: tuple[int, ...], outputs: int, own: Conv4Config) -> "Conv4":
    """The network for images of `input_shape` (channels, height, width)."""
    return Conv4(input_shape, outputs, own.width, own.pool, own.norm_eps, own.norm_gain)


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch normalisation and ReLU, then a linear head.

    With `pool="stride"` the convolutions have stride 2 and the features are averaged over
    space (Omniglot in Finn et al. 2017; 112,261 parameters for 28×28×1, width 64, 5-way). With
    `pool="max"` a 2×2 max-pooling follows each block and the features are flattened
    (Vinyals et al. 2016; mini-ImageNet in Finn et al. 2017).

    Batch normalisation uses the statistics of the batch that it is given, unless others are chosen
    by `norm` (`metarun.components.algo.normalising`).
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        width: int = Conv4Config.width,
        pool: Literal["stride", "max"] = Conv4Config.pool,
        norm_eps: float = Conv4Config.norm_eps,
        norm_gain: bool = Conv4Config.norm_gain,
    ) -> None:
        """Build for images of `input_shape` (channels, height, width).

        Raises:
            ValueError: the input is not an image, or too small for four halvings.
        """
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"backbone conv4 needs images (channels, height, width), but the examples have "
                f"shape {tuple(input_shape)}: use backbone=mlp"
            )
        channels = [input_shape[0], width, width, width, width]
        norms = [BatchNorm(width, norm_eps, norm_gain) for _ in range(4)]
        self.body = nn.Sequential(
            *(_block(channels[i], channels[i + 1], pool, norms[i]) for i in range(4))
        )
        self.flatten = pool == "max"
        height, breadth = input_shape[1:]
        for _ in range(4):
            height = (height + 1) // 2 if pool == "stride" else height // 2
            breadth = (breadth + 1) // 2 if pool == "stride" else breadth // 2
        if min(height, breadth) < 1:
            raise ValueError(f"images of {input_shape[1]}×{input_shape[2]} are too small for conv4")
        self.head = nn.Linear(width * height * breadth if self.flatten else width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, height, width) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, features)."""
        maps = self.maps(x)
        return maps.flatten(1) if self.flatten else maps.mean(dim=(-2, -1))

    def maps(self, x: Tensor) -> Tensor:
        """What the features are made of: (examples, channels, height, width)."""
        maps: Tensor = self.body(x)
        return maps


def _block(channels_in: int, channels_out: int, pool: str, norm: BatchNorm) -> nn.Sequential:
    stride = 2 if pool == "stride" else 1
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)),
        ("norm", norm),
        ("relu", nn.ReLU()),
    ]
    if pool == "max":
        layers.append(("pool", nn.MaxPool2d(2)))
    return nn.Sequential(OrderedDict(layers))
