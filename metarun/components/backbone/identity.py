"""No network: examples are their own features, as embeddings that were computed before are."""

from math import prod

from torch import Tensor, nn

from metarun.components.backbone.base import BackboneConfig
from metarun.config.component import builds, settings


@settings
class IdentityConfig(BackboneConfig):
    """No network: examples are their own features (data=features), with a linear head."""


@builds(IdentityConfig)
def identity(input_shape: tuple[int, ...], outputs: int, own: IdentityConfig) -> "Identity":
    """The network for examples of `input_shape`."""
    return Identity(prod(input_shape), outputs)


class Identity(nn.Module):
    """A linear head on the examples themselves, flattened.

    A method that has no use for the head, and nothing of its own to learn, has no meta-steps.

    Args:
        inputs: numbers of an example.
        outputs: of the head.
    """

    batch_norm = "none"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, …) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, numbers)."""
        return x.flatten(1)
