"""The networks of neural processes: from examples to the distribution of a query's target."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

LEAST_OF_LATENT = 0.1  # below which no deviation of a latent variable falls: their code


class Process(nn.Module):
    """What the encoder and the decoder are, and the attention between them.

    Args:
        inputs: features of an example.
        outputs: numbers of a target.
        encoder: units of its layers.
        decoder: units of its hidden layers.
        least: below which no predicted deviation falls.
        heads: of the attention; 0: the mean over examples in its place.
        latent: numbers of the latent variable; 0: none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        encoder: Sequence[int],
        decoder: Sequence[int],
        least: float,
        heads: int,
        latent: int,
    ) -> None:
        super().__init__()
        size, self.least, self.heads = encoder[-1], least, heads
        self.encoder = _layers([inputs + outputs, *encoder])
        self.decoder = _layers([size + latent + inputs, *decoder, 2 * outputs])
        self.keys = _layers([inputs, size, size]) if heads else None
        parts = ("query", "key", "value", "merge") if heads else ()
        self.attention = nn.ModuleDict({part: nn.Linear(size, size, False) for part in parts})
        self.latent = Latent(inputs + outputs, encoder, latent) if latent else None

    def forward(
        self, support: Tensor, targets: Tensor, queries: Tensor, z: Tensor | None = None
    ) -> Tensor:
        """Means and deviations of the targets of queries.

        Args:
            support: features (examples, inputs).
            targets: (examples, outputs).
            queries: features (queries, inputs).
            z: (latent,), where there is a latent variable.

        Returns:
            (queries, 2·outputs).
        """
        each = self.encoder(torch.cat([support, targets], dim=1))
        if self.keys is None:
            shared = each.mean(0, keepdim=True).expand(len(queries), -1)
        else:
            shared = self._attended(self.keys(queries), self.keys(support), each)
        parts = [shared, queries] if z is None else [shared, z.expand(len(queries), -1), queries]
        mean, raw = self.decoder(torch.cat(parts, dim=1)).chunk(2, dim=1)
        deviation = self.least + (1 - self.least) * nn.functional.softplus(raw)
        return torch.cat([mean, deviation], dim=1)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(("query", "key", "value"), (queries, keys, values), strict=True)
        q, k, v = (self.attention[n](x).unflatten(1, (self.heads, -1)) for n, x in parts)
        weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(q.shape[2])).softmax(-1)
        of_heads = torch.einsum("hqk,khd->qhd", weights, v)
        merged: Tensor = self.attention["merge"](of_heads.flatten(1))
        return merged


class Latent(nn.Module):
    """From examples to the Gaussian of a latent variable, of their mean encoding."""

    def __init__(self, inputs: int, encoder: Sequence[int], latent: int) -> None:
        super().__init__()
        self.encoder = _layers([inputs, *encoder])
        self.hidden = nn.Linear(encoder[-1], (encoder[-1] + latent) // 2)
        self.head = nn.Linear((encoder[-1] + latent) // 2, 2 * latent)

    def forward(self, examples: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (latent,) each."""
        each = self.encoder(torch.cat([examples, targets], dim=1))
        mean, raw = self.head(self.hidden(each.mean(0)).relu()).chunk(2)
        return mean, LEAST_OF_LATENT + (1 - LEAST_OF_LATENT) * raw.sigmoid()


def divergence(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """KL(one ‖ other) of Gaussians with independent numbers: mean and deviation of each."""
    (mean, deviation), (mean_there, there) = one, other
    apart = ((mean - mean_there) / there).square()
    return ((there / deviation).log() + ((deviation / there).square() + apart - 1) / 2).sum()


def _layers(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
