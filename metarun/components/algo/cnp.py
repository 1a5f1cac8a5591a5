"""Conditional Neural Process (Garnelo et al. 2018): a network from examples to a distribution."""

import math
from dataclasses import field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import Predictor, Support, at_once
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.normalising import refuse_each_query_alone
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

PREFIX = "process."
"""Begins the names of its own weights among the meta-parameters."""

HALF_OF_90 = 1.6448536269514722  # deviations from the mean, between which 90 % of a Gaussian lie


@settings
class CnpConfig:
    """Conditional Neural Process (Garnelo et al. 2018): a regression without inner steps."""

    of_training: ClassVar[tuple[str, ...]] = (
        "encoder", "decoder", "attention", "heads", "score_support",
    )  # fmt: skip

    encoder: list[int] = field(default_factory=lambda: [128, 128, 128, 128])  # units of its layers
    decoder: list[int] = field(default_factory=lambda: [128, 128])  # units of its hidden layers
    least_deviation: float = 0.1  # below which no predicted standard deviation falls
    attention: bool = False  # each query weighs the examples by itself (Kim et al. 2019)
    heads: int = 8  # of the attention
    score_support: bool = True  # the likelihood that is learned by counts support examples, too

    def __post_init__(self) -> None:
        for key in ("encoder", "decoder"):
            for units in getattr(self, key):
                between(f"algo.{key}", units, 1, MOST_UNITS)
        if not self.encoder:
            raise ConfigError("algo.encoder is empty: name the units of its layers, e.g. [128]")
        between("algo.least_deviation", self.least_deviation, 1e-6, 1)
        between("algo.heads", self.heads, 1, MOST_UNITS)
        if not self.attention and self.heads != CnpConfig.heads:
            raise ConfigError(f"algo.heads={self.heads}: it is for algo.attention=true")
        if self.attention and self.encoder[-1] % self.heads:
            raise ConfigError(
                f"algo.heads={self.heads}: must divide the last layer of algo.encoder, "
                f"{self.encoder[-1]}"
            )


@builds(CnpConfig)
def cnp(problem: Problem, own: CnpConfig) -> Algorithm:
    """Learn a network that maps a support set and a query to a Gaussian.

    With h the backbone's features of an input, r_i = encoder(h(x_i), y_i) for each support example
    and r their mean (equations 1 and 2), a query's mean and deviation are
    (μ, ω) = decoder(r, h(x)), σ = s + (1 − s)·softplus(ω) (equation 3), with s the least deviation,
    which is of the authors' code, as the default widths are.
    `backbone=mlp backbone.hidden=[]` has h(x) = x, which is the paper's network.

    With `attention` it is the deterministic path of the attentive process (Kim et al. 2019): each
    query has an r of its own, by attention of `heads` heads whose queries and keys are of h(x)
    behind a hidden layer, and whose values are the r_i. Their latent path is not here.

    The outer loss is the mean of −log N(y; μ, σ²) over support examples and queries (equation 4),
    or over queries alone. `train/loss` is the squared error of μ at queries. Logged are
    `train/log_likelihood` of queries, a mean, and `train/within_90`, the fraction of query targets
    within the central 90 % of their Gaussians.

    Args:
        problem: a regression; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a classification, or a model without features.
    """
    if problem.ways is not None:
        raise ValueError(
            "algo=cnp predicts numbers: choose a regression such as data=sinusoid backbone=mlp"
        )
    refuse_each_query_alone(problem.norm, "cnp")
    start, embed = embedding(problem.model, "cnp")
    like = next(problem.model.parameters())
    width = width_of(problem, embed, start)
    network = _Process(width, problem.outputs, own).to(like)
    weights = {f"{PREFIX}{n}": p.detach().clone() for n, p in network.named_parameters()}

    def predict(meta: Meta, support: Support, x: Tensor) -> Tensor:
        """Means and deviations, (queries, 2·outputs)."""
        params = {name.removeprefix(PREFIX): meta[name] for name in weights}
        found: Tensor = torch.func.functional_call(network, params, (support.x, support.y, x))
        return found

    def init() -> dict[str, Tensor]:
        return start | weights

    def adapt(meta: Meta, support: Support) -> Predictor:
        return lambda x: predict(meta, support, x).chunk(2, dim=1)[0]

    def outer(
        meta: Meta, support: Support, queries: Support, outputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y = torch.cat([queries.y, support.y])
        both = torch.cat([queries.x, support.x])
        mean, deviation = predict(meta, support, both).chunk(2, dim=1)
        errors = (y - mean) / deviation
        likelihoods = -0.5 * errors.square() - deviation.log() - 0.5 * math.log(2 * math.pi)
        count = len(queries.x)
        metrics = {
            "log_likelihood": likelihoods[:count].mean(),
            "within_90": (errors[:count].abs() <= HALF_OF_90).to(y).mean(),
        }
        scored = likelihoods if own.score_support else likelihoods[:count]
        return -scored.mean(), metrics

    return at_once(problem, init, adapt, encode=embed, outer=outer)


class _Process(nn.Module):
    """What the encoder and the decoder are, and the attention between them."""

    def __init__(self, inputs: int, outputs: int, own: CnpConfig) -> None:
        super().__init__()
        size, self.least, self.heads = own.encoder[-1], own.least_deviation, own.heads
        self.encoder = _layers([inputs + outputs, *own.encoder])
        self.decoder = _layers([size + inputs, *own.decoder, 2 * outputs])
        self.keys = _layers([inputs, size, size]) if own.attention else None
        parts = ("query", "key", "value", "merge") if own.attention else ()
        self.attention = nn.ModuleDict({part: nn.Linear(size, size, False) for part in parts})

    def forward(self, support: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """Support features and targets, query features -> (queries, 2·outputs)."""
        each = self.encoder(torch.cat([support, targets], dim=1))
        if self.keys is None:
            shared = each.mean(0, keepdim=True).expand(len(queries), -1)
        else:
            shared = self._attended(self.keys(queries), self.keys(support), each)
        mean, raw = self.decoder(torch.cat([shared, queries], dim=1)).chunk(2, dim=1)
        deviation = self.least + (1 - self.least) * nn.functional.softplus(raw)
        return torch.cat([mean, deviation], dim=1)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = zip(("query", "key", "value"), (queries, keys, values), strict=True)
        q, k, v = (self.attention[n](x).unflatten(1, (self.heads, -1)) for n, x in parts)
        weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(q.shape[2])).softmax(-1)
        of_heads = torch.einsum("hqk,khd->qhd", weights, v)
        merged: Tensor = self.attention["merge"](of_heads.flatten(1))
        return merged


def _layers(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
