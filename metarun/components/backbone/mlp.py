"""A multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected ReLU layers and a linear head; inputs are flattened.

    Two hidden layers of 40 are the network of Finn et al. 2017 for sinusoid regression.
    """

    batch_norm = "none"

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, hidden: Sequence[int] = (40, 40)
    ) -> None:
        super().__init__()
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
