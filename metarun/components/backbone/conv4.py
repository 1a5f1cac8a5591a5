"""The four-block convolutional network of the few-shot literature."""

from collections import OrderedDict
from math import prod
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.images import image_size
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import MOST_UNITS, between, one_each, positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError

BLOCKS = 4


@settings
class Conv4Config(NormalisedConfig):
    """Four convolution blocks (Vinyals et al. 2016; Finn et al. 2017)."""

    width: int = 64  # channels of each block
    widths: list[int] | None = None  # those of the first block to the fourth; null: width each
    pool: Literal["stride", "max"] = "stride"  # stride: 2 in each convolution; max: 2×2 pooling
    order: Literal["norm_relu_pool", "pool_norm_relu"] = "norm_relu_pool"  # pool=max: of a block
    padding: Literal["torch", "same"] = "torch"  # same: as SAME of TensorFlow, odd sizes round up
    features: Literal["mean", "flatten"] | None = None  # of the last maps; null: by pool
    norm_eps: float = 1e-5  # added to the variance; MAML's reference code: 1e-3
    norm_gain: bool = True  # scale what is normalised by a learned γ; MAML's reference code: false
    init: Literal["torch", "maml"] = "torch"  # maml: Xavier, no biases; head N(0, 1) behind a mean

    def __post_init__(self) -> None:
        super().__post_init__()
        between("backbone.width", self.width, 1, MOST_UNITS)
        if self.widths is not None:
            one_each("backbone.widths", self.widths, "block", BLOCKS, MOST_UNITS)
        positive("backbone.norm_eps", self.norm_eps)
        if self.order != "norm_relu_pool" and self.pool != "max":
            raise ConfigError(f"backbone.order={self.order}: it is for backbone.pool=max")


@builds(Conv4Config)
def conv4(input_shape: tuple[int, ...], outputs: int, own: Conv4Config) -> "Conv4":
    """The network for images of `input_shape` (channels, height, width)."""
    return Conv4(
        input_shape,
        outputs,
        own.width,
        own.pool,
        own.norm_eps,
        own.norm_gain,
        own.widths,
        own.order,
        own.padding,
        own.features,
        own.init,
    )


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch normalisation and ReLU, then a linear head.

    With `pool="stride"` the convolutions have stride 2 and the features are averaged over
    space (Omniglot in Finn et al. 2017; 112,261 parameters for 28×28×1, width 64, 5-way). With
    `pool="max"` a 2×2 max-pooling follows each block and the features are flattened
    (Vinyals et al. 2016; mini-ImageNet in Finn et al. 2017).

    The other settings are those of further codes. MAML's and Reptile's run in TensorFlow, whose
    convolutions of stride 2 pad images of even size at their end only, and whose pooling keeps the
    last row of an odd size: `padding="same"`. Reptile's flattens on Omniglot, and pools before it
    normalises on mini-ImageNet: `order="pool_norm_relu"`. Pooling between normalisation and ReLU
    is no choice of its own: it computes what pooling behind the ReLU does.

    `init="maml"` draws as MAML's code does: Xavier's uniform weights and zero biases. Its head is
    standard normal where the features are a mean (Omniglot) and Xavier's where they are flattened
    (mini-ImageNet).

    Batch normalisation uses the statistics of the batch that it is given, unless others are chosen
    by `norm` (`metarun.components.algo.normalising`).
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        width: int = Conv4Config.width,
        pool: str = Conv4Config.pool,
        norm_eps: float = Conv4Config.norm_eps,
        norm_gain: bool = Conv4Config.norm_gain,
        widths: list[int] | None = None,
        order: str = Conv4Config.order,
        padding: str = Conv4Config.padding,
        features: str | None = None,
        init: str = Conv4Config.init,
    ) -> None:
        """Build for images of `input_shape` (channels, height, width).

        Raises:
            ValueError: the input is not an image, or too small for four halvings.
        """
        super().__init__()
        channels, *size = image_size("conv4", input_shape)
        widths = [width] * BLOCKS if widths is None else widths
        norms = [BatchNorm(width, norm_eps, norm_gain) for width in widths]
        self.body = nn.Sequential(
            *(
                _block(before, width, pool, order, padding == "same", norm)
                for before, width, norm in zip([channels, *widths], widths, norms, strict=False)
            )
        )
        self.flatten = pool == "max" if features is None else features == "flatten"
        up = pool == "stride" or padding == "same"
        for _ in range(BLOCKS):
            size = [(n + up) // 2 for n in size]
        if min(size) < 1:
            raise ValueError(
                f"images of {input_shape[1]}×{input_shape[2]} are too small for conv4 with "
                "backbone.pool=max: use backbone.pool=stride, backbone.padding=same, or images of "
                "16×16 or more"
            )
        self.head = nn.Linear(widths[-1] * prod(size) if self.flatten else widths[-1], outputs)
        if init == "maml":
            _draw_as_maml(self)

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


class _PadSame(nn.Module):
    """TensorFlow's padding for a 3×3 convolution of stride 2: more at the end than at the start."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros around odd sizes; behind even ones."""
        height, width = x.shape[-2:]
        return F.pad(x, (width % 2, 1, height % 2, 1))


def _block(
    channels_in: int, channels_out: int, pool: str, order: str, same: bool, norm: BatchNorm
) -> nn.Sequential:
    stride = 2 if pool == "stride" else 1
    pads = same and pool == "stride"
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=0 if pads else 1)
    layers: dict[str, nn.Module] = {"norm": norm, "relu": nn.ReLU()}
    if pool == "max":
        layers["pool"] = nn.MaxPool2d(2, ceil_mode=same)
    wanted = [name for name in order.split("_") if name in layers]
    padding = [("pad", _PadSame())] if pads else []
    return nn.Sequential(
        OrderedDict([*padding, ("conv", conv), *((name, layers[name]) for name in wanted)])
    )


def _draw_as_maml(model: Conv4) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if not model.flatten:
        nn.init.normal_(model.head.weight)
