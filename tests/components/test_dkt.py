"""Deep Kernel Transfer: its Gaussian processes are those of GPyTorch."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.gaussian_process import marginal_likelihood, predicted
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.errors import ConfigError
from metarun.training.setup import Setup
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it uses torch.jit
    import gpytorch

F64 = torch.float64
KERNELS = ("bncossim", "cossim", "linear", "rbf", "spectral")


class Process(gpytorch.models.ExactGP):
    """GPyTorch's, with the hyperparameters of ours."""

    def __init__(
        self, kind: str, meta: dict[str, Tensor], x: Tensor, y: Tensor, noise: float
    ) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(1e-9)
        ).double()
        likelihood.noise = noise
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = kernel_of(kind, meta)
        self.double()
        self.mean_module.constant.data.copy_(meta["algo.mean"])

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def kernel_of(kind: str, meta: dict[str, Tensor]) -> Any:
    kernels = gpytorch.kernels
    if kind == "spectral":  # a sum of components, whose products over features are theirs
        parts = []
        weights, means, scales = (meta[f"kernel.{n}"].exp() for n in ("weights", "means", "scales"))
        for weight, mean, scale in zip(weights, means, scales, strict=True):
            part = kernels.SpectralMixtureKernel(1, ard_num_dims=len(mean)).double()
            part.mixture_weights = torch.ones(1, dtype=F64)
            part.mixture_means, part.mixture_scales = mean[None, None], scale[None, None]
            parts.append(kernels.ScaleKernel(part).double())
            parts[-1].outputscale = weight
        return kernels.AdditiveKernel(*parts)
    base = kernels.RBFKernel() if kind == "rbf" else kernels.LinearKernel()
    if kind == "rbf":
        base.lengthscale = meta["algo.length_scale"].exp()
    else:
        base.variance = 1.0
    scaled = kernels.ScaleKernel(base).double()
    scaled.outputscale = meta["algo.output_scale"].exp()
    return scaled.double()


def made(kind: str, data: str, *own: str) -> tuple[Setup, dict[str, Tensor]]:
    base = IMAGES if data == "glyphs" else SINE
    setup = setup_of("algo=dkt", *base, f"algo.kernel={kind}", *own)
    return setup, {name: value.detach() for name, value in stirred(setup).items()}


def features(kind: str, data: str, meta: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the kernel gets."""
    model = Conv4((1, 28, 28), 3, width=3) if data == "glyphs" else MLP((1,), 1, hidden=(6,))
    model.double().load_state_dict({n: v for n, v in meta.items() if "body" in n}, strict=False)
    z = model.features(x).detach()
    if kind == "bncossim":
        gain, shift = meta["feature_norm.weight"], meta["feature_norm.bias"]
        z = F.batch_norm(z, None, None, gain, shift, training=True)
    return F.normalize(z) if "cossim" in kind else z


@pytest.mark.parametrize("data", ["glyphs", "sinusoid"])
@pytest.mark.parametrize("kind", KERNELS)
def test_it_is_the_process_of_gpytorch(kind: str, data: str) -> None:
    """The marginal likelihood of all examples, and the prediction of queries."""
    setup, meta = made(kind, data)
    task = task_of(setup)
    support, queries = (features(kind, data, meta, x) for x in (task.support_x, task.query_x))
    y = [task.support_y, task.query_y]
    if data == "glyphs":
        y = [2 * F.one_hot(labels, 3).double() - 1 for labels in y]
    everything, targets = torch.cat([support, queries]), torch.cat(y)
    likelihoods, means, densities = [], [], []
    for known, unknown, all_of_it in zip(y[0].T, y[1].T, targets.T, strict=True):
        process = Process(kind, meta, everything, all_of_it, 0.1)
        process.train()
        exact = gpytorch.mlls.ExactMarginalLogLikelihood(process.likelihood, process)
        likelihoods.append(exact(process(everything), all_of_it))
        process = Process(kind, meta, support, known, 0.1).eval()
        process.likelihood.eval()
        found = process.likelihood(process(queries))
        means.append(found.mean)
        terms = (unknown - found.mean) ** 2 / found.variance
        densities.append(0.5 * (terms + (2 * math.pi * found.variance).log()).mean())
    value, extra = setup.algorithm.loss(meta, task)
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(value, -torch.stack(likelihoods).mean().detach(), **close)
    assert torch.equal(extra["metrics"]["marginal_nll"], value)
    assert setup.algorithm.adapt is not None
    way = 3 if data == "glyphs" else None
    ours = setup.algorithm.adapt(meta, task.support_x, task.support_y, way)(task.query_x)
    torch.testing.assert_close(ours, torch.stack(means, 1).detach(), **close)
    if data == "sinusoid":
        nll = extra["metrics"]["predictive_nll"]
        torch.testing.assert_close(nll, torch.stack(densities).mean().detach(), **close)
    else:
        assert "predictive_nll" not in extra["metrics"]


@pytest.mark.parametrize(
    ("data", "own"),
    [("glyphs", ("bncossim", "algo.learn_noise=true")), ("glyphs", ("rbf",)),
     ("sinusoid", ("spectral", "algo.learn_noise=true")), ("sinusoid", ("rbf",))],
)  # fmt: skip
def test_the_gradient_of_each_parameter_is_that_of_finite_differences(
    data: str, own: tuple[str, ...]
) -> None:
    setup, fixed = made(own[0], data, *own[1:])
    task, loss = task_of(setup), setup.algorithm.loss
    meta = {name: value.clone().requires_grad_() for name, value in fixed.items()}
    grads = torch.autograd.grad(loss(meta, task)[0], list(meta.values()))
    for name, grad in zip(meta, grads, strict=True):
        if float(grad.norm()) < 1e-9:  # the bias before a batch normalisation
            continue
        h = 1e-6 / float(grad.norm())
        ends = [float(loss(fixed | {name: fixed[name] + s * h * grad}, task)[0]) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * h)
        assert float(grad.square().sum()) == pytest.approx(slope, rel=1e-5)


def test_components_of_the_spectral_kernel_do_not_start_alike() -> None:
    setup, _ = made("spectral", "sinusoid")
    start = setup.algorithm.init()
    assert len(set(start["kernel.means"][:, 0].tolist())) == 4
    assert float(start["kernel.weights"].exp().sum()) == pytest.approx(1)


def test_features_of_zero_and_equal_examples_have_finite_gradients() -> None:
    for kind in KERNELS:
        setup, fixed = made(kind, "glyphs")
        task = task_of(setup)
        same = task._replace(support_x=0 * task.support_x, query_x=0 * task.query_x)
        meta = {n: (0 * v if "body" in n else v).requires_grad_() for n, v in fixed.items()}
        value = setup.algorithm.loss(meta, same)[0]
        grads = torch.autograd.grad(value, list(meta.values()))
        assert all(bool(grad.isfinite().all()) for grad in grads), kind


def test_what_has_no_factor_is_nan() -> None:
    """And not a number of some other matrix."""
    zero, noise = torch.zeros((), dtype=F64), torch.tensor(0.1, dtype=F64)
    y = torch.ones(2, 1, dtype=F64)
    bad = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=F64)
    assert bool(marginal_likelihood(bad, y, zero, noise).isnan())
    assert bool(predicted(bad, y, bad, bad.diagonal(), zero, noise).mean.isnan().all())
    small = torch.tensor(1e-6, dtype=torch.float32)  # beside a kernel of 10⁴ in float32
    large = torch.full((9, 9), 1e4, dtype=torch.float32)
    value = marginal_likelihood(large, torch.ones(9, 1), torch.zeros(()), small)
    assert bool(value.isfinite())


def test_normalisation_by_moving_averages_is_that_of_the_features_too() -> None:
    """Without a difference between queries alone and among others."""
    setup = setup_of("algo=dkt", *IMAGES, "backbone.norm=running")
    meta = {name: value.detach() for name, value in stirred(setup).items()}
    meta |= {name: meta[name].abs() + 0.5 for name in meta if name.endswith("var")}
    task = task_of(setup)
    assert len(setup.algorithm.kept) == 2 * 5
    assert set(setup.algorithm.loss(meta, task)[1]["kept"]) == set(setup.algorithm.kept)
    assert setup.algorithm.adapt is not None
    predict = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)
    torch.testing.assert_close(predict(task.query_x)[:1], predict(task.query_x[:1]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((*IMAGES, "backbone.norm=support_plus_one"), r"support_plus_one: algo=dkt learns by"),
        ((*IMAGES, "algo.length_scale=2"), r"algo\.length_scale=2\.0: .*kernel=rbf, not bncossim"),
        ((*IMAGES, "algo.mixtures=2"), r"algo\.mixtures=2: .*kernel=spectral, not bncossim"),
        ((*SINE, "algo.output_scale=2"), r"algo\.output_scale=2\.0: .* leave it out"),
        ((*IMAGES, "algo.noise=0"), r"algo\.noise=0\.0: must be 1e-06 or more"),
        ((*IMAGES, "algo.kernel=matern"), r"algo\.kernel=matern: choose one of bncossim"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of("algo=dkt", *settings)
