"""Deep Kernel Transfer (Patacchiola et al. 2020): a Gaussian process on learned features."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import (
    OWN_PREFIX,
    Algorithm,
    Problem,
    apply_model,
)
from metarun.components.algo.comparing import squared_distances
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.gaussian_process import Prediction, marginal_likelihood, predicted
from metarun.components.algo.normalising import refuse_each_query_alone
from metarun.components.algo.padding import known, present
from metarun.components.backbone.norm import BatchNorm
from metarun.config.checks import at_least, between, positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

NOISE, MEAN = OWN_PREFIX + "noise", OWN_PREFIX + "mean"
OUTPUT_SCALE, LENGTH_SCALE = OWN_PREFIX + "output_scale", OWN_PREFIX + "length_scale"
MIXTURE = tuple(f"kernel.{part}" for part in ("weights", "means", "scales"))
NORM = ("feature_norm.weight", "feature_norm.bias")

LEAST_NOISE = 1e-6  # what float64 tells from nothing beside any kernel of use
LEAST_SQUARE = 1e-12  # added to a squared length, so that features of zero have a direction

Kernel = Callable[[Meta, Tensor, Tensor], Tensor]
"""`kernel(meta, x, z)`: features (n, d) and (m, d) -> (n, m)."""


@settings
class DktConfig:
    """Deep Kernel Transfer (Patacchiola et al. 2020): a Gaussian process on features."""

    # None: bncossim where there are classes, spectral in a regression
    kernel: Literal["bncossim", "cossim", "linear", "rbf", "spectral"] | None = None  # of features
    noise: float = 0.1  # variance of the observation noise
    learn_noise: bool = False  # the noise becomes a meta-parameter, as its logarithm
    output_scale: float = 0.6931  # initial factor of the kernel; learned
    length_scale: float = 0.6931  # initial one of kernel=rbf; learned
    mixtures: int = 4  # components of kernel=spectral

    @property
    def of_training(self) -> tuple[str, ...]:
        """Settings that `metarun eval` has no use for: what is learned, and where it starts."""
        learned = ("learn_noise", "output_scale", "length_scale", "kernel", "mixtures")
        return (*learned, *(["noise"] if self.learn_noise else []))

    def __post_init__(self) -> None:
        at_least("algo.noise", self.noise, 1e-6)
        positive("algo.output_scale", self.output_scale)
        positive("algo.length_scale", self.length_scale)
        between("algo.mixtures", self.mixtures, 1, 1000)


@builds(DktConfig)
def dkt(problem: Problem, own: DktConfig) -> Algorithm:
    """Learn features and a kernel under which the examples of a task are likely.

    The outer loss is the negative logarithm of the marginal likelihood of support set and queries
    together (equation 4), a mean over examples and outputs, which is the reference code's, too.
    Queries are predicted by the mean of the process given the support set (equation 5). In a
    classification each class has a process of targets 1 and −1 (section 3.3, "label regression").

    Kernels of features h, with s the learned output scale:

    - linear: s·h·h'. cossim: the same of features of length 1. bncossim: with a batch
      normalisation before that, whose γ and β are learned.
    - rbf: s·exp(−‖h − h'‖² / 2ℓ²), with ℓ learned.
    - spectral: Σ_q w_q Π_d exp(−2π²τ_d²v_qd²)·cos(2πτ_dμ_qd) with τ = h − h' (Wilson and Adams
      2013, equation 12), with w, μ and v learned, from random values: the reference code starts all
      components at the same values, so that they stay the same. (GPyTorch 1.15 has the product of
      sums in place of the sum of products.)

    The mean of the process is a learned constant. All classes share the hyperparameters, so tasks
    may have any number of them; in the reference code each output has a mean and a scale of its
    own. Its batch statistics are those of support set and queries in one batch; here they are
    normalised as `backbone.norm` says.

    Logged are `train/marginal_nll`, the outer loss, and in a regression `train/predictive_nll`,
    the mean of −log p(y | x, support set) over queries; `train/loss` is the loss of the means.

    Args:
        problem: a classification or a regression; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a model without features, or settings of another kernel.
    """
    classifies = problem.ways is not None
    kind = own.kernel or ("bncossim" if classifies else "spectral")
    _refuse_idle(own, kind)
    refuse_each_query_alone(problem.norm, "dkt")
    start, embed = embedding(problem.model, "dkt")
    like = next(problem.model.parameters())
    width = width_of(problem, embed, start)
    if kind == "bncossim":
        network = _Normalised(problem.model, width).to(like)
        problem = problem._replace(model=network)  # whose layers of normalisation are seen to
        own_norm = network.norm.named_parameters()
        start |= {f"feature_norm.{name}": value.detach().clone() for name, value in own_norm}

        def embed(meta: Meta, x: Tensor) -> Tensor:
            params = {f"model.{n}": meta[n] for n in start if n not in NORM}
            norm = {f"norm.{n.rpartition('.')[2]}": meta[n] for n in NORM}
            return apply_model(network, params | norm, x)

    begin = _initial(own, kind, like, width)
    kernel = _KERNELS[kind]

    def init() -> dict[str, Tensor]:
        return start | begin

    def noise_of(meta: Meta) -> Tensor:
        return meta[NOISE].exp() if own.learn_noise else meta[MEAN].new_full((), own.noise)

    def targets_of(y: Tensor, way: int | None, x: Tensor) -> Tensor:
        return 2 * one_hot(Support(x, y, way)) - 1 if classifies else y

    def predict(meta: Meta, support: Support, x: Tensor) -> Prediction:
        return predicted(
            kernel(meta, support.x, support.x),
            targets_of(support.y, support.way, support.x),
            kernel(meta, support.x, x),
            kernel_diagonal(meta, x),
            meta[MEAN],
            noise_of(meta),
            support.known,
        )

    def kernel_diagonal(meta: Meta, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda one: kernel(meta, one[None], one[None])[0, 0])(x)

    def adapt(meta: Meta, support: Support) -> Predictor:
        return lambda x: predict(meta, support, x).mean

    def outer(
        meta: Meta, support: Support, queries: Support, outputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        both = torch.cat([support.x, queries.x])
        y = torch.cat([support.y, queries.y])
        likelihood = marginal_likelihood(
            kernel(meta, both, both),
            targets_of(y, support.way, both),
            meta[MEAN],
            noise_of(meta),
            *((known(y), present(support.y, outputs.shape[1])) if problem.uneven else ()),
        )
        metrics = {"marginal_nll": -likelihood}
        if not classifies:
            metrics["predictive_nll"] = _nll(predict(meta, support, queries.x), queries.y)
        return -likelihood, metrics

    return at_once(problem, init, adapt, encode=embed, outer=outer, uneven=classifies)


def _refuse_idle(own: DktConfig, kind: str) -> None:
    needed = {"length_scale": "rbf", "mixtures": "spectral"}
    for key, wanted in needed.items():
        if kind != wanted and (value := getattr(own, key)) != getattr(DktConfig, key):
            raise ConfigError(f"algo.{key}={value}: it is for algo.kernel={wanted}, not {kind}")
    if kind == "spectral" and own.output_scale != DktConfig.output_scale:
        raise ConfigError(
            f"algo.output_scale={own.output_scale}: the weights of algo.kernel=spectral are its "
            "scale; leave it out"
        )


def _initial(own: DktConfig, kind: str, like: Tensor, width: int) -> dict[str, Tensor]:
    """What is learned beside the features: logarithms, but for the mean."""
    found = {MEAN: like.new_zeros(())}
    if own.learn_noise:
        found[NOISE] = like.new_tensor(own.noise).log()
    if kind == "spectral":
        count = own.mixtures
        found[MIXTURE[0]] = like.new_full((count,), -math.log(count))
        for name in MIXTURE[1:]:  # frequencies that tell a few lengths of features apart
            found[name] = torch.randn(count, width).to(like) + math.log(0.1)
        return found
    found[OUTPUT_SCALE] = like.new_tensor(own.output_scale).log()
    if kind == "rbf":
        found[LENGTH_SCALE] = like.new_tensor(own.length_scale).log()
    return found


class _Normalised(nn.Module):
    """The features of a network behind a batch normalisation."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self.norm = model, BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.features(x)  # type: ignore[operator]
        normed: Tensor = self.norm(features[..., None, None])
        return normed.flatten(1)


def _linear(meta: Meta, x: Tensor, z: Tensor) -> Tensor:
    return meta[OUTPUT_SCALE].exp() * (x @ z.T)


def _cosine(meta: Meta, x: Tensor, z: Tensor) -> Tensor:
    return _linear(meta, _of_length_one(x), _of_length_one(z))


def _of_length_one(x: Tensor) -> Tensor:
    return x * (x.square().sum(1, True) + LEAST_SQUARE).rsqrt()


def _rbf(meta: Meta, x: Tensor, z: Tensor) -> Tensor:
    distances = squared_distances(x, z)
    return (meta[OUTPUT_SCALE] - 0.5 * distances * (-2 * meta[LENGTH_SCALE]).exp()).exp()


def _spectral(meta: Meta, x: Tensor, z: Tensor) -> Tensor:
    weights, means, scales = (meta[name].exp() for name in MIXTURE)
    apart = x[:, None] - z
    waves = (2 * math.pi * apart[:, :, None] * means).cos().prod(-1)
    falls = (-2 * math.pi**2 * apart.square() @ scales.square().T).exp()
    return (weights * falls * waves).sum(-1)


_KERNELS: dict[str, Kernel] = {
    "linear": _linear,
    "cossim": _cosine,
    "bncossim": _cosine,
    "rbf": _rbf,
    "spectral": _spectral,
}


def _nll(prediction: Prediction, y: Tensor) -> Tensor:
    """The mean of −log N(y; mean, variance) over queries and outputs."""
    variance = prediction.variance[:, None]
    terms = (y - prediction.mean).square() / variance + (2 * math.pi * variance).log()
    return 0.5 * terms.mean()
