"""Relation networks against easyfsl's, with the relation module in torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import RelationNetworks
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.relationnet import relationnet
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.unroll import sgd
from tests.components.agreeing import VECTORS, check_gradient, check_mapped
from tests.setups import IMAGES, setup_of, stirred, task_of

F64 = torch.float64
RELATION = ("algo=relationnet", "task.shot=2")


def problem(model: nn.Module, ways: tuple[int, int] | None = (3, 3), side: int = 28) -> Problem:
    kind = "regression" if ways is None else "classification"
    inner = InnerLoop(sgd(0.1), (), "global", {})
    return Problem(model, OBJECTIVES[kind], inner, 3, None, ways, (1, side, side))


def task(side: int, shot: int = 2) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(shot)
    x, queries = (torch.rand(2, 3 * shot, 1, side, side, generator=generator, dtype=F64)).unbind()
    return Episodes(x, labels, queries, labels)


class OfTorch(nn.Module):
    """The paper's module for Omniglot; where one pixel is left, it is not pooled."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        c = channels
        first: list[nn.Module] = [nn.Conv2d(2 * c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
        second: list[nn.Module] = [nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]
        first.append(nn.MaxPool2d(2))
        if side >= 4:
            second.append(nn.MaxPool2d(2))
        self.net = nn.Sequential(*first, *second, nn.Flatten())
        self.hidden, self.score = nn.Linear(c, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.score(F.relu(self.hidden(self.net(x)))).sigmoid()
        return found


@pytest.mark.parametrize("class_map", ["sum", "mean"])
@pytest.mark.parametrize("side", [28, 80], ids=["2×2", "5×5"])
def test_its_scores_and_their_gradient_are_those_of_easyfsl(side: int, class_map: str) -> None:
    torch.manual_seed(0)
    model = Conv4((1, side, side), 3, width=3).double()
    algorithm = relationnet(problem(model, side=side), class_map=class_map)
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    own = OfTorch(3, side // 16 + 1 if side == 28 else 5).double()
    given = [v.detach() for name, v in meta.items() if name.startswith("relation.")]
    for parameter, value in zip(own.parameters(), given, strict=True):
        parameter.data.copy_(value)
    other = RelationNetworks(nn.Identity(), feature_dimension=3, relation_module=own)
    example = task(side)
    other.process_support_set(model.maps(example.support_x), example.support_y)
    if class_map == "sum":
        other.prototypes = other.prototypes * 2
    expected = other(model.maps(example.query_x))
    assert algorithm.adapt is not None
    outputs = algorithm.adapt(meta, example.support_x, example.support_y, 3)(example.query_x)
    torch.testing.assert_close(outputs.sigmoid(), expected, rtol=1e-9, atol=1e-12)
    loss, extra = algorithm.loss(meta, example)
    squared = F.mse_loss(expected, F.one_hot(example.query_y, 3).double())
    torch.testing.assert_close(loss, squared, rtol=1e-9, atol=0)
    torch.testing.assert_close(extra["loss"], F.cross_entropy(outputs, example.query_y))
    ours = torch.autograd.grad(loss, list(meta.values()))
    body = [model.get_parameter(name) for name in meta if not name.startswith("relation.")]
    theirs = torch.autograd.grad(squared, [*body, *own.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_cross_entropy_is_of_what_the_sigmoid_would_get() -> None:
    setup = setup_of(*IMAGES, *RELATION, "algo.loss=cross_entropy")
    meta, given = stirred(setup), task_of(setup, split="train")
    outputs = setup.algorithm.adapt
    assert outputs is not None
    found = outputs(meta, given.support_x, given.support_y, 3)(given.query_x)
    loss, extra = setup.algorithm.loss(meta, given)
    torch.testing.assert_close(loss, F.cross_entropy(found, given.query_y))
    assert "metrics" not in extra
    squared, extra = setup_of(*IMAGES, *RELATION).algorithm.loss(meta, given)
    torch.testing.assert_close(extra["metrics"]["outer_loss"], squared.detach())
    assert float(squared.detach()) < 1 and torch.equal(extra["loss"], loss)


@pytest.mark.parametrize(
    "more",
    [
        ("algo.loss=cross_entropy", "algo.class_map=mean"),
        ("backbone.pool=max", "algo.hidden=3"),
        ("backbone.norm=support",),
    ],
)
def test_its_gradient_is_that_of_finite_differences(more: tuple[str, ...]) -> None:
    grads = check_gradient(*RELATION, *more)
    # A cross entropy does not see what is added to all classes: its slopes sum up to rounding.
    unseen = float(grads.pop("relation.score.bias").abs().max()) < 1e-12
    assert unseen == ("algo.loss=cross_entropy" in more)
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("norm", ["support_plus_one", "running"])
def test_it_is_mapped_under_each_norm(norm: str, caplog: pytest.LogCaptureFixture) -> None:
    small = (*IMAGES, "algo=relationnet", "task.query=1", "backbone.width=2")
    check_mapped(caplog, f"backbone.norm={norm}", network=small, recorded=False)


@pytest.mark.parametrize(
    ("norm", "alone"), [("transductive", False), ("support_plus_one", True), ("running", True)]
)
def test_the_norm_of_the_backbone_is_that_of_the_pairs(norm: str, alone: bool) -> None:
    setup = setup_of(*IMAGES, *RELATION, f"backbone.norm={norm}")
    meta, given = stirred(setup), task_of(setup)
    assert setup.algorithm.adapt is not None
    predict = setup.algorithm.adapt(meta, given.support_x, given.support_y, 3)
    assert torch.allclose(predict(given.query_x)[:1], predict(given.query_x[:1])) == alone


def test_running_moments_are_kept_of_both_layers_of_the_module() -> None:
    setup = setup_of(*IMAGES, *RELATION, "backbone.norm=running")
    kept = setup.algorithm.kept
    assert len(kept) == 2 * (4 + 2)
    meta = setup.algorithm.init()
    moved = setup.algorithm.loss(meta, task_of(setup, split="train"))[1]["kept"]
    assert all(not torch.equal(moved[name], meta[name]) for name in kept)


def test_without_maps_it_compares_vectors_each_pair_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    setup = setup_of(*VECTORS, *RELATION)
    assert "relations are between vectors: MLP has no method maps(x)" in caplog.text
    meta, given = stirred(setup), task_of(setup)
    assert setup.algorithm.adapt is not None
    outputs = setup.algorithm.adapt(meta, given.support_x, given.support_y, 3)(given.query_x)
    model = MLP((1, 28, 28), 3, [4]).double()
    model.load_state_dict({k: v.detach() for k, v in meta.items()}, strict=False)
    support, queries = model.features(given.support_x), model.features(given.query_x)
    w = {k.removeprefix("relation."): v for k, v in meta.items() if k.startswith("relation.")}
    assert set(w) == {
        f"{layer}.{part}"
        for layer in ("blocks.0", "blocks.2", "hidden", "score")
        for part in ("weight", "bias")
    }
    for i, query in enumerate(queries):
        for k in range(3):
            x = torch.cat([support[given.support_y == k].sum(0), query])
            for layer in ("blocks.0", "blocks.2", "hidden"):
                x = (w[f"{layer}.weight"].flatten(1) @ x + w[f"{layer}.bias"]).relu()
            expected = w["score.weight"] @ x + w["score.bias"]
            torch.testing.assert_close(outputs[i, k], expected[0])


def test_the_features_of_conv4_are_of_its_maps() -> None:
    x = torch.rand(2, 1, 32, 32)
    for pool, shape in (("stride", (2, 4, 2, 2)), ("max", (2, 4, 2, 2))):
        model = Conv4((1, 32, 32), 3, width=4, pool=pool)  # type: ignore[arg-type]
        maps = model.maps(x)
        assert maps.shape == shape
        expected = maps.mean((2, 3)) if pool == "stride" else maps.reshape(2, 16)
        torch.testing.assert_close(model.features(x), expected)


def test_what_it_cannot_do_is_refused() -> None:
    model = Conv4((1, 28, 28), 3, width=2)
    with pytest.raises(ValueError, match="algo=relationnet tells classes apart"):
        relationnet(problem(model, None))
    with pytest.raises(ValueError, match="algo=relationnet needs the features"):
        relationnet(problem(nn.Linear(28, 3)))
    with pytest.raises(ConfigError, match=r"algo\.hidden=0: must be from 1"):
        relationnet(problem(model), hidden=0)

    class Flat(Conv4):
        def maps(self, x: Tensor) -> Tensor:
            return super().maps(x).flatten(1)

        def features(self, x: Tensor) -> Tensor:
            return self.maps(x)

    with pytest.raises(ValueError, match=r"maps\(x\) of Flat gives \(8,\) for an example"):
        relationnet(problem(Flat((1, 28, 28), 3, width=2)))
