"""Methods that learn an ordinary classifier first: what they say, and their oracles."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods.utils import entropy
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from metarun.components.algo.adapting import Adapted, Support, Watch, by_steps
from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem, Steps
from metarun.components.algo.baseline import baseline
from metarun.components.algo.baseline_pp import baseline_pp
from metarun.components.algo.minibatches import minibatches
from metarun.components.algo.transductive_finetuning import mean_entropy, transductive_finetuning
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.episodes.source import Batch, Episodes
from metarun.errors import ConfigError
from metarun.unroll import adam, sgd
from tests.components.test_every_algorithm import CPU, REGRESSES, TASKS
from tests.conftest import Metarun
from tests.setups import IMAGES, setup_of

RUN = (
    "train", "data=glyphs", "backbone.width=3", "trainer.steps=2", "trainer.meta_batch=2",
    "trainer.eval_episodes=2", "trainer.test_episodes=2", "task.query=2", "task.way=3",
    "hydra.run.dir=run",
)  # fmt: skip


def test_a_run_says_what_its_training_accuracy_is_over(metarun: Metarun) -> None:
    said = metarun(*RUN, "algo=baseline", "algo.eval_inner_steps=2").stderr
    assert "its accuracy is over all 636 training classes, that of validation and test over" in said
    assert "over the 3 of a task" in said
    assert "plain batches" not in metarun(*RUN, "hydra.run.dir=maml").stderr


CLOSER_LOOK = {"momentum": 0.9, "dampening": 0.9, "weight_decay": 1e-3}


def problem(**changes: Any) -> Problem:
    torch.manual_seed(0)
    model = Conv4((1, 28, 28), 3, width=4).double()
    inner = InnerLoop(sgd(0.01, **CLOSER_LOOK), (), "global", {})
    given = Problem(
        model, OBJECTIVES["classification"], inner, 3, None, (3, 3), (1, 28, 28), classes=7
    )
    return given._replace(**changes)


def images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 28, 28, dtype=torch.float64, generator=generator)


class CosineLayer(nn.Module):
    """The classifier of Baseline++ in torch's own parts: `weight_norm` has the learned lengths."""

    def __init__(self, weight: Tensor, scale: float, learned_length: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        with torch.no_grad():
            self.linear.weight.copy_(weight)
        self.learned_length, self.scale = learned_length, scale
        if learned_length:
            weight_norm(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        x = x / x.norm(dim=1, keepdim=True)
        weight = self.linear.weight
        if not self.learned_length:
            weight = weight / weight.norm(dim=1, keepdim=True)
        return self.scale * x @ weight.T


@pytest.mark.parametrize("lengths", [True, False])
def test_the_classifier_of_baseline_pp_is_torchs_weight_norm_on_directions(lengths: bool) -> None:
    ours = problem()
    algorithm = baseline_pp(ours, weight_norm=lengths)
    x, y = images(5), torch.tensor([0, 6, 2, 2, 5])
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    assert ("classifier.length" in meta) == lengths and "classifier.bias" not in meta
    loss, extra = algorithm.loss(meta, Batch(x, y))
    layer = CosineLayer(meta["classifier.weight"].detach(), 2.0, lengths)
    own = [*layer.parameters()]  # of weight_norm: the lengths, then the directions
    if lengths:
        with torch.no_grad():
            torch.testing.assert_close(own[0][:, 0], meta["classifier.length"], rtol=1e-6, atol=0)
            own[0][:, 0] = meta["classifier.length"]  # which were drawn in float32
    expected = F.cross_entropy(layer(ours.model.features(x)), y)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert torch.equal(extra["kept"]["head.weight"], meta["head.weight"])
    learned = [name for name in meta if name.startswith(("body.", "classifier."))]
    grads = torch.autograd.grad(loss, [meta[name] for name in learned])
    body = [ours.model.get_parameter(name) for name in learned if name.startswith("body.")]
    theirs = torch.autograd.grad(expected, [*body, *reversed(own)])
    for ours_, theirs_ in zip(grads, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_.view_as(ours_), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [4, None])
@pytest.mark.parametrize("lengths", [True, False])
def test_the_head_of_baseline_pp_is_that_of_torchs_sgd(lengths: bool, size: int | None) -> None:
    ours = problem()
    algorithm = baseline_pp(ours, eval_inner_steps=9, inner_batch=size, weight_norm=lengths)
    x, queries, y = images(6), images(4, seed=2), torch.tensor([0, 0, 1, 1, 2, 2])
    assert algorithm.adapt is not None
    meta = algorithm.init()
    scores = algorithm.adapt(meta, x, y, 3)(queries)
    features = ours.model.features(x).detach()
    head = CosineLayer(meta["head.weight"][:3], 2.0, lengths)
    optimizer = torch.optim.SGD(head.parameters(), 0.01, **CLOSER_LOOK)
    turns = minibatches(6, size, 9, CPU)
    for step in range(9):
        chosen = range(6) if turns is None else turns[step].tolist()
        optimizer.zero_grad()
        F.cross_entropy(head(features[list(chosen)]), y[list(chosen)]).backward()
        optimizer.step()
    right = head(ours.model.features(queries))
    torch.testing.assert_close(scores, right, rtol=1e-9, atol=1e-12)


def test_the_scale_is_2_and_beyond_200_classes_10() -> None:
    losses = {}
    for classes in (200, 201):
        for scale in (None, 2.0, 10.0):
            algorithm = baseline_pp(problem(classes=classes), scale=scale)
            batch = Batch(images(3), torch.tensor([0, 1, 2]))
            losses[classes, scale] = algorithm.loss(algorithm.init(), batch)[0].item()
    assert losses[200, None] == losses[200, 2.0] != losses[200, 10.0]
    assert losses[201, None] == losses[201, 10.0] != losses[201, 2.0]


def test_features_that_are_all_zero_have_scores_and_gradients() -> None:
    algorithm = baseline_pp(problem(), eval_inner_steps=2)
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    dead = {k: v - 100.0 if k.endswith("3.norm.bias") else v for k, v in meta.items()}
    loss, _ = algorithm.loss(dead, Batch(images(3), torch.tensor([0, 1, 2])))
    grads = torch.autograd.grad(loss, list(meta.values()), materialize_grads=True)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert algorithm.adapt is not None
    scores = algorithm.adapt(dead, images(3), torch.tensor([0, 1, 2]), 3)(images(2))
    assert bool(scores.isfinite().all())


def test_minibatches_are_dealt_from_shuffled_decks() -> None:
    turns = minibatches(6, 2, 7, CPU)
    assert turns is not None and turns.shape == (7, 2)
    decks = turns[:6].reshape(2, 6)
    assert [sorted(deck) for deck in decks.tolist()] == [list(range(6))] * 2
    assert all(deck != list(range(6)) for deck in decks.tolist()) and len(decks.unique(dim=0)) == 2
    assert minibatches(6, 6, 7, CPU) is None and minibatches(6, None, 7, CPU) is None


def test_minibatches_change_the_head_of_baseline() -> None:
    x, y, heads = images(6), torch.tensor([0, 0, 1, 1, 2, 2]), []
    for size in (None, 4, 6):
        algorithm = baseline(problem(), eval_inner_steps=3, inner_batch=size)
        assert algorithm.adapt is not None
        heads.append(algorithm.adapt(algorithm.init(), x, y, 3)(x))
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


def test_what_baseline_pp_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.way=9: algo=baseline_pp has a first head for as"):
        baseline_pp(problem(ways=(9, 9)))
    with pytest.raises(ValueError, match="algo=baseline_pp learns from plain batches of labelled"):
        baseline_pp(problem(classes=None))
    with pytest.raises(ValueError, match=r"algo=baseline_pp needs the features .*features\(x\)"):
        baseline_pp(problem(model=nn.Linear(4, 3)))
    for setting in ({"scale": 0.0}, {"inner_batch": 0}):
        with pytest.raises(ConfigError, match="must be"):
            baseline_pp(problem(), **setting)


def test_a_task_may_have_fewer_classes_than_in_training(metarun: Metarun) -> None:
    metarun(*RUN, "algo=baseline_pp", "algo.eval_inner_steps=2")
    assert "5-way 1-shot" in metarun("eval", "ckpt=run", "task.way=5", "hydra.run.dir=e").stdout
    said = metarun("eval", "ckpt=run", "algo.weight_norm=false", "hydra.run.dir=f", code=2).stderr
    assert "algo.weight_norm: it is of training alone" in said


# ---------------------------------------------------------------- transductive fine-tuning


class FineTuned(nn.Module):
    """Equations 6 and 7 of Dhillon et al. 2020."""

    def __init__(self, backbone: nn.Module, classifier: nn.Linear, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier
        self.new = nn.Linear(classifier.out_features, int(y.max()) + 1).double()
        with torch.no_grad():
            for k in range(len(self.new.bias)):
                mean = self.logits(x)[y == k].mean(0)
                self.new.weight[k] = mean / mean.norm()
            self.new.bias.zero_()

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone.features(x)).clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.logits(x)
        return self.new(z / z.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_transductive_finetuning_is_the_loop_written_out(weight: float) -> None:
    """Adam on all weights, by turns for the two terms of equation 8."""
    ours = problem(inner=InnerLoop(adam(0.01), (), "global", {}))
    algorithm = transductive_finetuning(ours, eval_inner_steps=5, entropy=weight)
    assert algorithm.transductive == (weight > 0)
    x, queries, y = images(6), images(9, seed=2), torch.tensor([0, 0, 1, 1, 2, 2])
    meta = algorithm.init()
    trace = algorithm.trace(meta, Episodes(x, y, queries, torch.arange(9) % 3))
    classifier = nn.Linear(4, 7).double()
    classifier.load_state_dict({k: meta[f"classifier.{k}"] for k in ("weight", "bias")})
    model = FineTuned(copy.deepcopy(ours.model), classifier, x, y)
    body = [p for n, p in model.backbone.named_parameters() if not n.startswith("head.")]
    learned = [*body, *classifier.parameters(), *model.new.parameters()]
    optimizer, losses = torch.optim.Adam(learned, 0.01), []
    for step in range(6):
        losses.append(F.cross_entropy(model(queries), torch.arange(9) % 3).detach())
        optimizer.zero_grad()
        if weight and step % 2:
            (weight * entropy(model(queries))).backward()
        else:
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(trace.query_loss.detach(), torch.stack(losses), rtol=1e-8, atol=0)


def test_a_prediction_depends_on_the_other_queries_by_the_entropy_alone() -> None:
    """Without normalisation by a batch, that is: an MLP has none."""
    model = MLP((4,), 3, hidden=(6,)).double()
    given = problem(model=model, input_shape=(4,), inner=InnerLoop(sgd(0.5), (), "global", {}))
    x, queries = torch.randn(2, 6, 4, dtype=torch.float64)
    y = torch.arange(6) % 3
    for weight in (0.0, 1.0):
        algorithm = transductive_finetuning(given, eval_inner_steps=4, entropy=weight)
        assert algorithm.adapt is not None
        predict = algorithm.adapt(algorithm.init(), x, y, 3)
        alone, among = predict(queries[:1]), predict(queries)[:1]
        assert torch.allclose(alone, among) == (weight == 0)


def test_entropy_and_its_gradient_are_finite_where_a_class_is_sure() -> None:
    logits = torch.tensor([[0.0, 800.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = mean_entropy(logits)
    assert float(found.detach()) == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert bool(torch.autograd.grad(found, logits)[0].isfinite().all())


def test_results_say_that_a_method_is_transductive(metarun: Metarun, tmp_path: Path) -> None:
    few = ("algo=transductive_finetuning", "algo.eval_inner_steps=3", "inner_opt.lr=0.01")
    said = metarun(*RUN, *few).stdout
    assert "3 inner steps, adapted to the queries together (transductive), batch norm" in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"]["transductive"]
    plain = metarun("eval", "ckpt=run", "algo.entropy=0", "task.way=5", "hydra.run.dir=e").stdout
    assert "5-way" in plain and "adapted to the queries" not in plain
    for norm in ("support", "support_plus_one", "running"):
        refused = metarun(*RUN, *few, f"backbone.norm={norm}", "hydra.run.dir=no", code=2).stderr
        assert f"backbone.norm={norm}" in refused and "choose" in refused


def test_what_transductive_finetuning_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="algo=transductive_finetuning learns from plain batches"):
        transductive_finetuning(problem(classes=None))
    with pytest.raises(ValueError, match="differentiates nothing"):
        transductive_finetuning(problem(inner=InnerLoop(sgd(0.1), ("lr",), "global", {})))
    with pytest.raises(ConfigError, match=r"algo\.entropy=-1: must be 0 or more"):
        transductive_finetuning(problem(), entropy=-1)


# ---------------------------------------------------------------- what the methods share


def test_moving_averages_are_those_of_torchs_batch_norm_and_are_evaluated_by() -> None:
    ours = problem(norm="running")
    for algorithm in (baseline(ours, eval_inner_steps=2), baseline_pp(ours, eval_inner_steps=2)):
        meta, x = algorithm.init(), images(5)
        assert {name for name in algorithm.kept if name.startswith("norm.")} == {
            f"norm.{i}.{part}" for i in range(4) for part in ("mean", "var")
        }
        kept = algorithm.loss(meta, Batch(x, torch.arange(5)))[1]["kept"]
        layer = nn.BatchNorm2d(4).double()
        layer(ours.model.get_submodule("body.0.conv")(x))
        torch.testing.assert_close(kept["norm.0.mean"], layer.running_mean)
        torch.testing.assert_close(kept["norm.0.var"], layer.running_var)
        assert algorithm.adapt is not None
        predict = algorithm.adapt(meta | kept, images(3), torch.arange(3), 3)
        torch.testing.assert_close(predict(x[:1]), predict(x)[:1])


@pytest.mark.parametrize("transductive", [False, True])
def test_a_method_that_says_so_gets_the_queries_wherever_it_adapts(transductive: bool) -> None:
    """By loss, trace and adapt; one that does not say so never sees them."""
    seen: list[Any] = []

    def adapt(meta: Any, support: Support, steps: int, watch: Watch | None) -> Adapted:
        seen.append(support.queries)

        def predict(given: Tensor) -> Tensor:
            return meta["a"] * given.flatten(1)[:, :3]

        watched = [] if watch is None else [watch(predict)]
        return Adapted(predict, meta["a"].new_empty(0), watched)

    meta = {"a": torch.ones((), dtype=torch.float64)}
    made = by_steps(
        problem(),
        lambda: dict(meta),
        adapt,
        Steps(0, 0),
        encode=lambda meta, x: 2 * x,
        transductive=transductive,
    )
    x, queries, y = images(3), images(4, seed=2), torch.arange(3)
    task = Episodes(x, y, queries, torch.arange(4) % 3)
    made.loss(meta, task)
    made.trace(meta, task)
    assert made.adapt is not None
    made.adapt(meta, x, y, 3)(queries)
    assert len(seen) == 3
    for given in seen:
        assert given is None if not transductive else torch.equal(given, 2 * queries)


@pytest.mark.parametrize("algo", [name for name in TASKS if name not in REGRESSES])
def test_a_frozen_network_is_no_mystery(algo: str) -> None:
    """Nothing of the body is learned: heads and own values may be, or a sentence says why not."""
    settings = (*IMAGES, f"algo={algo}", "backbone.frozen=['body.*']")
    try:
        setup = setup_of(*settings)
    except ConfigError as error:
        assert "froze" in str(error) or "is learned" in str(error), error
    else:
        assert not any(name.startswith("body.") for name in setup.algorithm.init())
