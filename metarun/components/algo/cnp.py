"""Neural processes (Garnelo et al. 2018, Kim et al. 2019): from examples to a distribution."""

import math
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from metarun.components.algo.adapting import Predictor, Support, at_once
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.neural_process import Process, divergence
from metarun.components.algo.normalising import refuse_each_query_alone
from metarun.components.precision import computed_in_format
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

PREFIX = "process."
"""Begins the names of its own weights among the meta-parameters."""

HALF_OF_90 = 1.6448536269514722  # deviations from the mean, between which 90 % of a Gaussian lie


@settings
class CnpConfig:
    """Neural processes (Garnelo et al. 2018, Kim et al. 2019): regressions without inner steps."""

    of_training: ClassVar[tuple[str, ...]] = (
        "encoder", "decoder", "attention", "heads", "latent", "score_support",
    )  # fmt: skip

    encoder: list[int] = field(default_factory=lambda: [128, 128, 128, 128])  # units of its layers
    decoder: list[int] = field(default_factory=lambda: [128, 128])  # units of its hidden layers
    least_deviation: float = 0.1  # below which no predicted standard deviation falls
    attention: bool = False  # each query weighs the examples by itself (Kim et al. 2019)
    heads: int = 8  # of the attention
    latent: int = 0  # numbers of the latent variable, 128 in their code; 0: none
    samples: int = 16  # of the latent variable, whose predictions are averaged
    score_support: bool = True  # the likelihood that is learned by counts support examples, too

    def __post_init__(self) -> None:
        for key in ("encoder", "decoder"):
            for units in getattr(self, key):
                between(f"algo.{key}", units, 1, MOST_UNITS)
        if not self.encoder:
            raise ConfigError("algo.encoder is empty: name the units of its layers, e.g. [128]")
        between("algo.least_deviation", self.least_deviation, 1e-6, 1)
        between("algo.heads", self.heads, 1, MOST_UNITS)
        between("algo.latent", self.latent, 0, MOST_UNITS)
        between("algo.samples", self.samples, 1, MOST_UNITS)
        if not self.latent and self.samples != CnpConfig.samples:
            raise ConfigError(f"algo.samples={self.samples}: it is of algo.latent; leave it out")
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
    behind a hidden layer, and whose values are the r_i.

    With `latent` a second encoder gives the Gaussian q(z | examples) of a latent variable, which
    the decoder takes beside r and h(x): functions can then be drawn that are each smooth (Garnelo
    et al. 2018b, Kim et al. 2019). Training draws z from q(z | T), with T all that is scored, and
    adds KL(q(z | T) ‖ q(z | support)) / |T| to the loss, as their code has it. An evaluation draws
    `samples` z from q(z | support), always by the same numbers, and its prediction is the mean of
    theirs. A training that draws z is not recorded.

    The outer loss is the mean of −log N(y; μ, σ²) over support examples and queries (equation 4),
    or over queries alone. `train/loss` is the squared error of μ at queries. Logged are
    `train/log_likelihood` of queries, a mean, and `train/within_90`, the fraction of query targets
    within the central 90 % of their Gaussians. With a latent variable both are of a z that has seen
    the queries, and the divergence is logged as `train/kl`.

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
    heads = own.heads if own.attention else 0
    network = Process(
        width, problem.outputs, own.encoder, own.decoder, own.least_deviation, heads, own.latent
    ).to(like)
    weights = {f"{PREFIX}{n}": p.detach().clone() for n, p in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(own.samples, own.latent, generator=generator, dtype=like.dtype).to(like)

    def predict(meta: Meta, support: Support, x: Tensor, z: Tensor | None) -> Tensor:
        """Means and deviations, (queries, 2·outputs)."""
        params = {name.removeprefix(PREFIX): meta[name] for name in weights}
        given = (support.x, support.y, x, z)
        return computed_in_format(lambda: functional_call(network, params, given), x, x.dtype)

    def latent(meta: Meta, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the deviation of the latent variable, (latent,) each."""
        of_latent = network.latent
        assert of_latent is not None
        own_prefix = f"{PREFIX}latent."
        params = {n.removeprefix(own_prefix): meta[n] for n in weights if n.startswith(own_prefix)}

        def both() -> Tensor:
            return torch.stack(functional_call(of_latent, params, (x, y)))

        mean, deviation = computed_in_format(both, x, x.dtype).unbind()
        return mean, deviation

    def init() -> dict[str, Tensor]:
        return start | weights

    def adapt(meta: Meta, support: Support) -> Predictor:
        if not own.latent:
            return lambda x: predict(meta, support, x, None).chunk(2, dim=1)[0]
        mean, deviation = latent(meta, support.x, support.y)

        def predictor(x: Tensor) -> Tensor:
            found = [predict(meta, support, x, mean + deviation * one) for one in noise]
            return torch.stack(found).mean(0).chunk(2, dim=1)[0]

        return predictor

    def outer(
        meta: Meta, support: Support, queries: Support, outputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = torch.cat([queries.x, support.x]), torch.cat([queries.y, support.y])
        count = len(queries.x)
        scored = len(x) if own.score_support else count
        z, apart = None, None
        if own.latent:
            mean, deviation = seen = latent(meta, x[:scored], y[:scored])
            z = mean + deviation * torch.randn_like(deviation)
            apart = divergence(seen, latent(meta, support.x, support.y))
        mean, deviation = predict(meta, support, x, z).chunk(2, dim=1)
        errors = (y - mean) / deviation
        likelihoods = -0.5 * errors.square() - deviation.log() - 0.5 * math.log(2 * math.pi)
        metrics = {
            "log_likelihood": likelihoods[:count].mean(),
            "within_90": (errors[:count].abs() <= HALF_OF_90).to(y).mean(),
        }
        value = -likelihoods[:scored].mean()
        if apart is not None:
            metrics["kl"] = apart
            value = value + apart / scored
        return value, metrics

    return at_once(problem, init, adapt, encode=embed, outer=outer)
