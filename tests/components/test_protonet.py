"""The distances of prototypical networks, against implementations of others."""

import learn2learn as l2l
import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import PrototypicalNetworks
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, Algorithm, InnerLoop, Problem
from metarun.components.algo.protonet import protonet
from metarun.components.backbone.conv4 import Conv4
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.unroll import sgd
from tests.conftest import Metarun
from tests.setups import IMAGES, setup_of, stirred, task_of

F64 = torch.float64


def problem(model: nn.Module | None = None) -> Problem:
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 3, width=4) if model is None else model
    inner = InnerLoop(sgd(0.1), (), "global", {})
    return Problem(model.to(F64), OBJECTIVES["classification"], inner, 3, None, (3, 3))


def task() -> Episodes:
    x, queries = torch.rand(2, 9, 1, 28, 28, dtype=F64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(9) % 3
    return Episodes(x, labels, queries, labels)


def scored(algorithm: Algorithm, given: Episodes) -> Tensor:
    assert algorithm.adapt is not None
    return algorithm.adapt(algorithm.init(), given.support_x, given.support_y, 3)(given.query_x)


def test_cosines_are_those_of_learn2learn_with_their_gradient() -> None:
    ours, given = problem(), task()
    algorithm = protonet(ours, distance="cosine", scale=10.0)
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    loss = algorithm.loss(meta, given)[0]
    classifier, features = l2l.nn.PrototypicalClassifier(distance="cosine"), ours.model.features
    classifier.fit_(features(given.support_x), given.support_y)
    scale = torch.tensor(10.0, dtype=F64, requires_grad=True)
    expected = F.cross_entropy(scale * classifier(features(given.query_x)), given.query_y)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # it adds 1e-8 to norms
    theirs = [scale if n == "algo.scale" else ours.model.get_parameter(n) for n in meta]
    found = torch.autograd.grad(loss, list(meta.values()))
    wanted = torch.autograd.grad(expected, theirs)
    one, other = (torch.cat([grad.flatten() for grad in grads]) for grads in (found, wanted))
    assert (one - other).norm() < 1e-6 * other.norm()


def test_distances_are_the_squares_of_those_of_easyfsl() -> None:
    """Which takes the root, in contrast to the paper: as good a label, another loss."""
    ours, given = problem(), task()

    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours.model.features(x)

    theirs = PrototypicalNetworks(Backbone())
    theirs.process_support_set(given.support_x, given.support_y)
    roots = theirs(given.query_x)
    scores = scored(protonet(ours), given)
    torch.testing.assert_close(scores, -roots.square(), rtol=1e-7, atol=1e-12)
    whole = scored(protonet(ours, normalise=True), given)
    torch.testing.assert_close(whole, -roots.square() / 4, rtol=1e-7, atol=1e-12)


def test_the_head_of_metaoptnet_learns_a_factor_of_the_mean_square() -> None:
    """−γ·‖f − c‖²/d, by the expansion ‖f‖² − 2f·c + ‖c‖² that its code takes."""
    ours, given = problem(), task()
    algorithm = protonet(ours, normalise=True, scale=1.5)
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    support, queries = (ours.model.features(x) for x in (given.support_x, given.query_x))
    means = torch.stack([support[given.support_y == k].mean(0) for k in range(3)])
    square = (
        queries.square().sum(1, keepdim=True) - 2 * queries @ means.T + means.square().sum(1)[None]
    )
    scale = meta["algo.scale"].detach().requires_grad_()
    expected = F.cross_entropy(-scale * square / queries.shape[1], given.query_y)
    loss = algorithm.loss(meta, given)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found = torch.autograd.grad(loss, meta["algo.scale"])[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, scale)[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_examples_that_are_all_alike_have_a_gradient(distance: str) -> None:
    """Distance 0, and features that are all 0."""
    x = torch.zeros(6, 1, 28, 28, dtype=F64)
    given = Episodes(x, torch.arange(6) % 3, x, torch.arange(6) % 3)
    for dead in (0.0, 100.0):
        algorithm = protonet(problem(), distance=distance)
        meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
        less = {k: v - dead if k.endswith("3.norm.bias") else v for k, v in meta.items()}
        loss = algorithm.loss(less, given)[0]
        grads = torch.autograd.grad(loss, list(meta.values()), materialize_grads=True)
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert float(loss.detach()) == pytest.approx(torch.tensor(3.0).log().item())


@pytest.mark.parametrize("more", [("algo.distance=cosine", "algo.scale=10"), ("algo.scale=2",)])
def test_the_gradient_of_its_settings_is_that_of_finite_differences(more: tuple[str, ...]) -> None:
    setup = setup_of(*IMAGES, "algo=protonet", *more)
    meta, given, h = stirred(setup), task_of(setup), 1e-6
    grads = torch.autograd.grad(setup.algorithm.loss(meta, given)[0], list(meta.values()))
    along = {name: torch.randn_like(value) for name, value in meta.items()}
    ends = [
        float(
            setup.algorithm.loss(
                {n: (v + sign * h * along[n]).detach() for n, v in meta.items()}, given
            )[0]
        )
        for sign in (1, -1)
    ]
    slope = sum(float((g * along[n]).sum()) for g, n in zip(grads, meta, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_settings_without_a_meaning_are_refused(metarun: Metarun) -> None:
    with pytest.raises(ConfigError, match=r"algo\.normalise: a cosine does not grow"):
        protonet(problem(), distance="cosine", normalise=True)
    with pytest.raises(ConfigError, match=r"algo\.scale=0\.0: must be above 0"):
        protonet(problem(), scale=0.0)
    said = metarun("train", "algo=protonet", "algo.distance=manhattan", code=2).stderr
    assert "algo.distance=manhattan: choose one of euclidean, cosine" in said
