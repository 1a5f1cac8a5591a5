"""FEAT against easyfsl's, with the same weights; its contrastive loss, by sets of each class."""

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import FEAT
from easyfsl.modules import MultiHeadAttention
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.feat import SetToSet, feat
from metarun.components.backbone.conv4 import Conv4
from metarun.errors import ConfigError
from metarun.training.inert import without_effect
from metarun.unroll import sgd
from tests.components.agreeing import VECTORS, check_gradient
from tests.setups import IMAGES, config_of, setup_of, stirred, task_of

THEIRS = {"w_qs": "query", "w_ks": "key", "w_vs": "value", "fc": "out", "layer_norm": "norm"}


def attention_of(meta: dict[str, Tensor], width: int) -> MultiHeadAttention:
    """easyfsl's attention with our weights, as in evaluation."""
    found = MultiHeadAttention(1, width, width, width).double().eval()
    for name, parameter in found.named_parameters():
        layer, _, part = name.partition(".")
        parameter.data.copy_(meta[f"transformer.{THEIRS[layer]}.{part}"].detach())
    return found


@pytest.mark.parametrize("shot", [1, 3])
def test_its_scores_are_by_the_distances_of_easyfsl(shot: int) -> None:
    setup = setup_of(*IMAGES, "algo=feat", f"task.shot={shot}", "algo.temperature=8")
    meta, task = stirred(setup), task_of(setup)
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict({k: v.detach() for k, v in meta.items()}, strict=False)
    other = FEAT(nn.Identity(), attention_module=attention_of(meta, 3))
    other.process_support_set(model.features(task.support_x), task.support_y)
    expected = -other(model.features(task.query_x)).square() / 8
    assert setup.algorithm.adapt is not None
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_outer_loss_adds_that_of_sets_of_each_class(mixed: bool) -> None:
    constants = ("algo.balance=0.7", "algo.temperature=4", "algo.contrast_temperature=2")
    setup = setup_of(*IMAGES, "algo=feat", *constants, "task.shot=2", "task.query=3")
    meta, task = stirred(setup), task_of(setup, split="train")
    if mixed:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        task = task._replace(query_x=task.query_x[order], query_y=task.query_y[order])
    loss, extra = setup.algorithm.loss(meta, task)
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict({k: v.detach() for k, v in meta.items()}, strict=False)
    support, queries = model.features(task.support_x), model.features(task.query_x)
    attention = attention_of(meta, 3)
    sets = [torch.cat([support[task.support_y == k], queries[task.query_y == k]]) for k in range(3)]
    centres = [attention(one[None], one[None], one[None])[0][0].mean(0) for one in sets]
    near = [-((one[:, None] - torch.stack(centres)) ** 2).sum(-1) / 2 for one in sets]
    labels = torch.arange(3).repeat_interleave(5)
    contrast = F.cross_entropy(torch.cat(near), labels)
    torch.testing.assert_close(loss, extra["loss"] + 0.7 * contrast, rtol=1e-9, atol=0)
    torch.testing.assert_close(extra["metrics"]["outer_loss"], loss.detach())


def test_without_balance_it_learns_by_the_query_loss() -> None:
    settings = (*IMAGES, "algo=feat", "algo.balance=0")
    setup = setup_of(*settings)
    loss, extra = setup.algorithm.loss(stirred(setup), task_of(setup, split="train"))
    assert torch.equal(loss, extra["loss"]) and "metrics" not in extra
    check_gradient("algo=feat", "algo.balance=0", "task.shot=2")
    config = config_of(*settings, "algo.contrast_temperature=8")
    told = without_effect(config, "classification", 3)
    assert told == ["algo.contrast_temperature=8.0 (algo.balance is 0)"]


def test_what_is_dropped_is_drawn_anew_in_training_and_nothing_is_in_evaluation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    for batching in ("vmap", "loop"):
        for more in ("algo.dropout=0.5", "algo.attention_dropout=0.5"):
            small = (*VECTORS, "algo=feat", "algo.balance=0", f"engine.batching={batching}")
            setup = setup_of(*small, more)
            meta, tasks = stirred(setup), setup.train_tasks.sample(0, 2)
            losses = [float(setup.gradient(meta, tasks)[1].loss) for _ in range(4)]
            assert len(set(losses)) > 1
            with torch.no_grad():
                traces = [setup.trace(meta, tasks).query_loss for _ in range(2)]
            assert torch.equal(*traces)
    assert "in a loop" not in caplog.text


def test_the_transformer_starts_as_in_their_code() -> None:
    torch.manual_seed(0)
    ours, width = SetToSet(200, 0.5, 0.1), 200
    theirs = MultiHeadAttention(1, width, width, width)
    for name, parameter in theirs.named_parameters():
        layer, _, part = name.partition(".")
        own = ours.get_parameter(f"{THEIRS[layer]}.{part}")
        assert own.shape == parameter.shape
        assert float(own.std().detach()) == pytest.approx(float(parameter.std().detach()), rel=0.15)
    assert not any(hasattr(layer, "bias") and layer.bias is not None
                   for layer in (ours.query, ours.key, ours.value))  # fmt: skip


def problem(model: nn.Module, ways: tuple[int, int] | None = (3, 3)) -> Problem:
    kind = "regression" if ways is None else "classification"
    inner = InnerLoop(sgd(0.1), (), "global", {})
    return Problem(model, OBJECTIVES[kind], inner, 3, None, ways, (1, 28, 28))


def test_what_it_cannot_do_is_refused() -> None:
    model = Conv4((1, 28, 28), 3, width=2)
    with pytest.raises(ValueError, match="algo=feat tells classes apart"):
        feat(problem(model, None))
    with pytest.raises(ValueError, match="algo=feat needs the features"):
        feat(problem(nn.Linear(2, 3)))
    for setting, message in (
        ({"temperature": 0.0}, r"algo\.temperature=0\.0: must be above 0"),
        ({"contrast_temperature": -1.0}, r"algo\.contrast_temperature=-1\.0: must be above 0"),
        ({"balance": -1.0}, r"algo\.balance=-1\.0: must be"),
        ({"dropout": 1.0}, r"algo\.dropout=1: nothing would be left"),
        ({"attention_dropout": 2.0}, r"algo\.attention_dropout=2\.0: must be from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            feat(problem(model), **setting)
