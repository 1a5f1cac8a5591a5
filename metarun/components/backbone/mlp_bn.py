"""The fully connected network for Omniglot (Santoro et al. 2016; Finn et al. 2017)."""

from collections import OrderedDict
from dataclasses import field
from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor, nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.mlp import MOST_LAYERS
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import MOST_UNITS, between, positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError

DEVIATION = 0.01  # of MAML's first weights


@settings
class MlpBnConfig(NormalisedConfig):
    """A multilayer perceptron with batch normalisation."""

    hidden: list[int] = field(default_factory=lambda: [256, 128, 64, 64])  # units of each layer
    norm_eps: float = 1e-5  # added to the variance; MAML's reference code: 1e-3
    norm_gain: bool = True  # scale what is normalised by a learned γ; MAML's reference code: false
    init: Literal["torch", "maml"] = "torch"  # maml: normal within 2σ, σ = 0.01; no biases

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.hidden) <= MOST_LAYERS:
            raise ConfigError(f"backbone.hidden: must be from 1 to {MOST_LAYERS} layers")
        for units in self.hidden:
            between("backbone.hidden", units, 1, MOST_UNITS)
        positive("backbone.norm_eps", self.norm_eps)


@builds(MlpBnConfig)
def mlp_bn(input_shape: tuple[int, ...], outputs: int, own: MlpBnConfig) -> "MlpBn":
    """The network for examples of `input_shape`."""
    return MlpBn(input_shape, outputs, own)


class MlpBn(nn.Module):
    """Layers of linear map, batch normalisation and ReLU, and a linear head; inputs are flattened.

    Hidden layers of 256, 128, 64 and 64 are "MAML, no conv" of Finn et al. 2017. `init="maml"`
    draws as their code does: truncated normal with σ = 0.01 in every layer, zero biases.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, own: MlpBnConfig) -> None:
        super().__init__()
        sizes = [prod(input_shape), *own.hidden]
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    OrderedDict(
                        linear=nn.Linear(before, after),
                        norm=BatchNorm(after, own.norm_eps, own.norm_gain),
                        relu=nn.ReLU(),
                    )
                )
                for before, after in pairwise(sizes)
            )
        )
        self.head = nn.Linear(sizes[-1], outputs)
        if own.init == "maml":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    bound = 2 * DEVIATION
                    nn.init.trunc_normal_(module.weight, std=DEVIATION, a=-bound, b=bound)
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, *input_shape) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, features)."""
        features: Tensor = self.body(x.flatten(1))
        return features
