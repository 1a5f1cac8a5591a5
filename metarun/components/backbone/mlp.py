"""A multilayer perceptron."""

from collections.abc import Sequence
from dataclasses import field
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from metarun.components.backbone.base import BackboneConfig
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError

MOST_LAYERS = 1000  # far beyond what anybody means


@settings
class MlpConfig(BackboneConfig):
    """A multilayer perceptron."""

    hidden: list[int] = field(default_factory=lambda: [40, 40])  # units of each hidden layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.hidden) > MOST_LAYERS:
            raise ConfigError(f"backbone.hidden: must be {MOST_LAYERS} layers or fewer")
        for units in self.hidden:
            between("backbone.hidden", units, 1, MOST_UNITS)


@builds(MlpConfig)
def mlp(input_shape: tuple[int, ...], outputs: int, own: MlpConfig) -> "MLP":
    """The network for examples of `input_shape`."""
    return MLP(input_shape, outputs, own.hidden)


class MLP(nn.Module):
    """Fully connected ReLU layers and a linear head; inputs are flattened.

    Two hidden layers of 40 are the network of Finn et al. 2017 for sinusoid regression.
    """

    batch_norm = "none"

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        hidden: Sequence[int] | None = None,
    ) -> None:
        """Build for examples of `input_shape`; without `hidden`, with the settings' layers."""
        super().__init__()
        hidden = MlpConfig().hidden if hidden is None else hidden
        sizes = [prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, *input_shape) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, features)."""
        features: Tensor = self.body(x.flatten(1))
        return features
