"""A network without its head, for methods that compare features, or fit a head of their own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import Encode
from metarun.components.algo.base import Problem, apply_model, detached_parameters
from metarun.unroll import Meta


class Features(nn.Module):
    """The part of a backbone before its head, as a module that can be called functionally."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`model.features(x)`."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]
        return features


class Embedding(NamedTuple):
    """The features of a backbone.

    Attributes:
        start: the initial parameters that they are computed with.
        embed: `embed(meta, x)`: (examples, …) -> (examples, features).
    """

    start: dict[str, Tensor]
    embed: Encode


def embedding(model: nn.Module, algo: str) -> Embedding:
    """The features of a backbone, which has them if it has a method `features(x)`.

    Args:
        model: the backbone; parameters named `head.…` are left out.
        algo: the algorithm's name, for the message.

    Raises:
        ValueError: the backbone has no features.
    """
    if not hasattr(model, "features"):
        raise ValueError(
            f"algo={algo} needs the features of a backbone: give {type(model).__name__} a method "
            "features(x), (examples, …) -> (examples, features), as conv4 and mlp have"
        )
    features = Features(model)
    start = {n: p for n, p in detached_parameters(model).items() if not n.startswith("head.")}

    def embed(meta: Meta, x: Tensor) -> Tensor:
        return apply_model(features, {f"model.{name}": meta[name] for name in start}, x)

    return Embedding(start, embed)


def width_of(problem: Problem, embed: Encode, start: Meta) -> int:
    """How many features an example has.

    Args:
        problem: has the shape of an example.
        embed: gives the features.
        start: parameters.
    """
    like = next(problem.model.parameters())
    with torch.no_grad():
        return int(embed(start, like.new_zeros(2, *problem.input_shape)).shape[1])
