"""Matching networks against the formula, and easyfsl's of the same weights."""

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import MatchingNetworks
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.matchingnet import in_order, matchingnet, reading
from metarun.components.backbone.conv4 import Conv4
from metarun.errors import ConfigError
from metarun.unroll import sgd
from tests.components.agreeing import check_gradient, check_mapped
from tests.setups import IMAGES, setup_of, stirred, task_of

FULL = ("algo=matchingnet", "algo.full_context=true")
CODE = ("algo.scale=100", "algo.relu=true")


def problem(ways: tuple[int, int] | None = (3, 3), model: nn.Module | None = None) -> Problem:
    kind = "regression" if ways is None else "classification"
    model = Conv4((1, 14, 14), 3, width=4).double() if model is None else model
    inner = InnerLoop(sgd(0.1), (), "global", {})
    return Problem(model, OBJECTIVES[kind], inner, 3, None, ways, (1, 14, 14))


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """From torch's own function, pair by pair."""
    return torch.stack([F.cosine_similarity(queries, key[None], dim=1) for key in keys], 1)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("shot", [1, 3])
def test_a_class_has_the_attention_that_its_examples_get(code: bool, shot: int) -> None:
    setup = setup_of(
        *IMAGES, "algo=matchingnet", f"task.shot={shot}", *(CODE if code else ("algo.scale=2",))
    )
    meta, task = stirred(setup), task_of(setup)
    features = {k: v.detach() for k, v in meta.items()}
    assert setup.algorithm.adapt is not None
    outputs = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict(features, strict=False)
    near = cosines(model.features(task.query_x), model.features(task.support_x))
    attention = (100 * near.relu() if code else 2 * near).softmax(1)
    expected = attention @ F.one_hot(task.support_y, 3).double()
    torch.testing.assert_close(outputs.exp(), expected, rtol=1e-9, atol=1e-14)
    loss = setup.algorithm.loss(meta, task)[0]
    chosen = expected.gather(1, task.query_y[:, None])
    torch.testing.assert_close(loss, -chosen.log().mean(), rtol=1e-9, atol=0)


def theirs(meta: dict[str, Tensor], width: int) -> MatchingNetworks:
    """easyfsl's networks with our weights; queries are normalised, as in the paper."""

    class Cosine(MatchingNetworks):  # type: ignore[misc]
        def encode_query_features(self, query_features: Tensor) -> Tensor:
            return F.normalize(super().encode_query_features(query_features))

    found = Cosine(nn.Identity(), feature_dimension=width).double()
    for name, part in (("support", found.support_features_encoder),
                       ("query", found.query_features_encoding_cell)):  # fmt: skip
        begins = f"context.{name}."
        part.load_state_dict(
            {k.removeprefix(begins): v.detach() for k, v in meta.items() if k.startswith(begins)}
        )
    return found


@pytest.mark.parametrize("shot", [1, 3])
def test_full_context_is_that_of_easyfsl(shot: int) -> None:
    setup = setup_of(*IMAGES, *FULL, f"task.shot={shot}")
    meta, task = stirred(setup), task_of(setup)
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict({k: v.detach() for k, v in meta.items()}, strict=False)
    support, queries = (model.features(x).detach() for x in (task.support_x, task.query_x))
    other = theirs(meta, 3)
    other.process_support_set(support, task.support_y)
    other.one_hot_support_labels = other.one_hot_support_labels.double()
    expected = other(queries).exp() - 1e-6
    assert setup.algorithm.adapt is not None
    outputs = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    torch.testing.assert_close(outputs.exp(), expected, rtol=1e-9, atol=1e-12)
    with_context = in_order(meta, support)
    torch.testing.assert_close(with_context, other.contextualized_support_features)
    read = reading(meta, queries, with_context, len(support))
    torch.testing.assert_close(F.normalize(read), other.encode_query_features(queries))
    few = reading(meta, queries, with_context, 1)
    other.contextualized_support_features = with_context[:1]  # one step, of one example
    alone = reading(meta, queries, with_context[:1], 1)
    torch.testing.assert_close(F.normalize(alone), other.encode_query_features(queries))
    assert shot == 1 or not torch.allclose(few, read)


def test_how_often_a_query_reads_is_a_setting() -> None:
    found = []
    for more in ((), ("algo.reads=3",), ("algo.reads=2",)):
        setup = setup_of(*IMAGES, *FULL, "task.shot=1", *more)
        found.append(float(setup.algorithm.loss(stirred(setup), task_of(setup))[0].detach()))
    assert found[0] == found[1] != found[2]


def test_the_order_of_examples_matters_with_full_context_alone() -> None:
    for full in (True, False):
        setup = setup_of(*IMAGES, "algo=matchingnet", f"algo.full_context={full}", "task.shot=2")
        meta, task = stirred(setup), task_of(setup)
        assert setup.algorithm.adapt is not None
        outputs = [
            setup.algorithm.adapt(meta, x, y, 3)(task.query_x)
            for x, y in (
                (task.support_x, task.support_y),
                (task.support_x.flip(0), task.support_y.flip(0)),
            )
        ]
        assert torch.allclose(*outputs) != full


@pytest.mark.parametrize("more", [(), CODE, ("algo.reads=2",)])
def test_its_gradient_with_full_context_is_that_of_finite_differences(
    more: tuple[str, ...],
) -> None:
    grads = check_gradient(*FULL, *more, "task.shot=2")
    assert all(bool(grad.any()) for name, grad in grads.items() if name.startswith("context."))


def test_full_context_is_mapped_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    check_mapped(caplog, *FULL, "task.shot=1", "algo.reads=2")


def test_features_of_zero_and_classes_without_examples_have_finite_gradients() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def features(self, x: Tensor) -> Tensor:
            return self.factor * x

    algorithm = matchingnet(problem(model=Given()), scale=100.0)
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    assert algorithm.adapt is not None
    outputs = algorithm.adapt(meta, x, torch.tensor([0, 0, 1]), 3)(x)
    assert float(outputs[0, 0].detach().exp()) == pytest.approx(2 / 3)
    assert not outputs[:, 2].detach().exp().any()
    loss = F.cross_entropy(outputs, torch.tensor([0, 1, 1]))
    grads = torch.autograd.grad(loss, [x, *meta.values()])
    assert all(bool(grad.isfinite().all()) and float(grad.abs().max()) < 1e3 for grad in grads)


@pytest.mark.parametrize(("relu", "least"), [(False, -200.0), (True, -100.0)])
def test_far_probabilities_have_exact_logarithms(relu: bool, least: float) -> None:
    """Where the floor of 1e-6 in the code of Chen et al. would stop the gradient."""
    algorithm = matchingnet(problem(model=_Plain()), scale=100.0, relu=relu)
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert algorithm.adapt is not None
    outputs = algorithm.adapt(algorithm.init(), x, torch.tensor([0, 1]), 2)(x)
    torch.testing.assert_close(outputs, torch.tensor([[0.0, least], [least, 0.0]]).double())


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        return x + 0 * self.unused


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="algo=matchingnet tells classes apart"):
        matchingnet(problem(None))
    with pytest.raises(ValueError, match="algo=matchingnet needs the features"):
        matchingnet(problem(model=nn.Linear(2, 3)))
    with pytest.raises(ConfigError, match=r"algo\.reads=2: it is for algo\.full_context=true"):
        matchingnet(problem(), reads=2)
    with pytest.raises(ConfigError, match=r"algo\.reads=0: must be from 1"):
        matchingnet(problem(), reads=0, full_context=True)
    with pytest.raises(ConfigError, match=r"algo\.scale=0\.0: must be above 0"):
        matchingnet(problem(), scale=0.0)
