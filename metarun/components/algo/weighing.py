"""How much each training example counts, where that is learned."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.unroll import Meta

PREFIX = "weigh."
"""Begins the names of what is learned about weights."""


class Weighing(NamedTuple):
    """A learned weight for each training example.

    Attributes:
        initial: the meta-parameters, by name.
        weights: `weights(meta, losses, number)`, (examples,): by the examples' losses (examples,),
            which are constants here, and by their numbers int64 (examples,).
    """

    initial: dict[str, Tensor]
    weights: Callable[[Meta, Tensor, Tensor], Tensor]


def by_network(units: int, like: Tensor) -> Weighing:
    """A network that gives an example's weight by its loss: Meta-Weight-Net.

    v(ℓ) = σ(w₂·relu(w₁ℓ + b₁) + b₂).

    Args:
        units: of the hidden layer.
        like: of the type and on the device of the parameters.

    References:
        Shu et al. 2019, Meta-Weight-Net: learning an explicit mapping for sample weighting.
    """
    layers = {"hidden": nn.Linear(1, units), "output": nn.Linear(units, 1)}
    initial = {
        f"{PREFIX}{name}.{key}": value.detach().to(like)
        for name, layer in layers.items()
        for key, value in layer.named_parameters()
    }

    def weights(meta: Meta, losses: Tensor, number: Tensor) -> Tensor:
        def layer(name: str, x: Tensor) -> Tensor:
            return F.linear(x, meta[f"{PREFIX}{name}.weight"], meta[f"{PREFIX}{name}.bias"])

        return layer("output", layer("hidden", losses[:, None]).relu()).sigmoid()[:, 0]

    return Weighing(initial, weights)


def by_example(examples: int, like: Tensor) -> Weighing:
    """A number a for each training example, whose weight is 2σ(a): from 0 to 2, and 1 at first.

    Args:
        examples: how many there are.
        like: as for `by_network`.

    References:
        Franceschi et al. 2017, Forward and reverse gradient-based hyperparameter optimization
        (data hyper-cleaning).
        Ren et al. 2018, Learning to reweight examples for robust deep learning (whose weights are
        one step from 0, made anew for each batch).
    """
    name = f"{PREFIX}examples"
    return Weighing(
        {name: torch.zeros(examples).to(like)},
        lambda meta, losses, number: 2 * meta[name][number].sigmoid(),
    )
