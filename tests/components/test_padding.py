"""Padded tasks: every algorithm that takes them makes of each what it makes of the task alone."""

import copy
import importlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, Algorithm, InnerLoop, Problem, Trace
from metarun.components.algo.padding import known, moves_rows_apart, over_known, without_absent
from metarun.components.backbone.mlp_bn import MlpBn, MlpBnConfig
from metarun.components.backbone.norm import BatchNorm, counting
from metarun.config.catalogue import schemas
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.training.evaluation import evaluate_split
from metarun.training.loop import meta_step
from metarun.training.state import fresh
from metarun.unroll import (
    Implicit,
    Truncated,
    adafactor,
    adam,
    mean_gradient,
    partition,
    recorded,
    sgd,
    unrecorded,
)  # fmt: skip
from metarun.unroll.advice import UnsuitableModel
from tests.setups import setup_of, stirred

F64 = torch.float64
WAY, SUPPORT, QUERIES = 4, 9, 8
SHAPE = (1, 3, 3)
SHOTS = ([1, 3], [2, 2, 2], [1, 1, 2, 3])
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def alone(place: int) -> tuple[int, Episodes]:
    """A task of its own shape, and how many classes it has."""
    shots = SHOTS[place]
    way = len(shots)
    labels = torch.arange(way).repeat_interleave(torch.tensor(shots))
    asked = torch.arange(way).repeat_interleave(2)
    x, queries = numbers(len(labels), *SHAPE, seed=place), numbers(2 * way, *SHAPE, seed=9 + place)
    return way, Episodes(x, labels, queries, asked)


def padded(task: Episodes, filled: float = 0.0) -> Episodes:
    """The same in the shape of all; what pads it has other values than a sampler gives it."""

    def to(part: Tensor, size: int, value: float) -> Tensor:
        rest = part.new_full((size - len(part), *part.shape[1:]), value)
        return torch.cat([part, rest])

    return Episodes(
        to(task.support_x, SUPPORT, filled),
        to(task.support_y, SUPPORT, -1),
        to(task.query_x, QUERIES, filled),
        to(task.query_y, QUERIES, -1),
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return MlpBn(SHAPE, WAY, MlpBnConfig(hidden=[6, 5])).double()


def of_classes(model: nn.Module, way: int) -> nn.Module:
    """The network without the outputs of the classes that a task does not have."""
    model, forward = copy.deepcopy(model), type(model).forward
    model.forward = lambda x: forward(model, x)[:, :way]  # type: ignore[method-assign]
    return model


def problem(way: int | None, norm: str = "transductive", **inner: Any) -> Problem:
    """Of padded tasks; or, with a way, of tasks of that many classes and nothing else."""
    loop = InnerLoop(
        **{"optimizer": sgd(0.1), "learn": (), "granularity": "global", "groups": {}} | inner
    )
    plain, ways = OBJECTIVES["classification"], (way or WAY, way or WAY)
    model = network() if way is None else of_classes(network(), way)
    objective = over_known(plain) if way is None else plain
    return Problem(model, objective, loop, WAY, None, ways, SHAPE, 7, norm, None, way is None)


def builder(name: str, **own: Any) -> Callable[[Problem], Algorithm]:
    build = getattr(importlib.import_module(f"metarun.components.algo.{name}"), name)
    return lambda problem: cast(Algorithm, build(problem, **own))


def descent(name: str, **own: Any) -> Callable[[Problem], Algorithm]:
    return builder(name, inner_steps=2, eval_inner_steps=2, **own)


def moved(made: Algorithm) -> dict[str, Tensor]:
    """Meta-parameters that are not those at the start."""
    start = {n: v + 0.1 * numbers(*v.shape, seed=i) for i, (n, v) in enumerate(made.init().items())}
    kept = {n: start[n].abs() + 0.5 for n in made.kept}  # a variance, a weight
    return {n: kept[n] if n in kept else v.requires_grad_() for n, v in start.items()}


def gradient(loss: Tensor, meta: dict[str, Tensor]) -> list[Tensor]:
    leaves = [value for value in meta.values() if value.requires_grad]
    if not leaves:
        return []  # a control that learns nothing
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)]


def check(build: Callable[[Problem], Algorithm], norm: str = "transductive", **inner: Any) -> None:
    """Loss, gradient, what is kept, curves and scores are those of the task alone."""
    made = build(problem(None, norm, **inner))
    assert made.uneven
    meta = moved(made)
    step = (torch.tensor(3.0, dtype=F64),) if made.follows_step else ()
    way, task = alone(0)
    plain, together = build(problem(way, norm, **inner)), padded(task, filled=7.0)
    if made.batch_size is None:
        (loss, extra), (expected, theirs) = (
            one.loss(meta, given, *step) for one, given in ((made, together), (plain, task))
        )
        torch.testing.assert_close((loss, extra), (expected, theirs), **CLOSE)
        torch.testing.assert_close(gradient(loss, meta), gradient(expected, meta), **CLOSE)
    assert made.outputs is not None and plain.outputs is not None
    with torch.no_grad():
        found, expected = made.trace(meta, together), plain.trace(meta, task)
        outputs = made.outputs(meta, together)[:, : len(task.query_y)]
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(outputs[..., :way], plain.outputs(meta, task), **CLOSE)
    assert (outputs[..., way:] == -torch.inf).all()


GLYPHS = (
    "data=glyphs", "backbone=mlp_bn", "backbone.hidden=[6]", "task.query=2",
    "task.way=4", "task.shot=3", "task.min_way=2", "task.min_shot=1", "engine.precision=float64",
    "engine.compile=none", "trainer.meta_batch=3",
)  # fmt: skip

HEADS: dict[str, Callable[[Problem], Algorithm]] = {
    "protonet": builder("protonet"),
    "protonet by cosines": builder("protonet", distance="cosine", scale=10.0),
    "meta_baseline": builder("meta_baseline"),
    "matchingnet": builder("matchingnet"),
    "matchingnet, sharp": builder("matchingnet", scale=100.0, relu=True),
    "r2d2": builder("r2d2", learn_ridge=True),
    "simpleshot": builder("simpleshot"),
    "relationnet": builder("relationnet", hidden=3),
    "relationnet, entropy": builder(
        "relationnet", hidden=3, loss="cross_entropy", class_map="mean"
    ),
    "metaoptnet, ridge": builder("metaoptnet", head="ridge", label_smoothing=0.1),
    "dkt": builder("dkt", learn_noise=True),
    "dkt, rbf": builder("dkt", kernel="rbf"),
    "nearest_neighbour": builder("nearest_neighbour"),
    "feat": builder("feat", dropout=0.0, attention_dropout=0.0, balance=0.3),
}
DESCENTS: dict[str, Callable[[Problem], Algorithm]] = {
    "maml": descent("maml"),
    "maml, first order": descent("maml", order=1),
    "maml, annealed": descent("maml", first_order_until=5),
    "maml by shots": descent("maml", reduction="per_shot"),
    "maml, all steps": descent("maml", multi_step_loss=5, per_step=["*.norm.*"]),
    "maml_pp": descent("maml_pp"),
    "anil": descent("anil"),
    "boil": descent("boil"),
    "meta_sgd": descent("meta_sgd"),
    "meta_curvature": descent("meta_curvature"),
    "cavia": descent("cavia", contexts=3),
    "sparse_maml": descent("sparse_maml"),
    "sharp_maml": descent("sharp_maml", inner_radius=0.1),
    "proto_maml": descent("proto_maml", order=2),
    "unicorn_maml": descent("unicorn_maml", order=2),
    "reptile": descent("reptile"),
    "scratch": builder("scratch", eval_inner_steps=3),
    "baseline": builder("baseline", eval_inner_steps=3),
    "baseline_pp": builder("baseline_pp", eval_inner_steps=3, inner_batch=None),
}


@pytest.mark.parametrize("build", [*HEADS.values(), *DESCENTS.values()], ids=[*HEADS, *DESCENTS])
def test_a_padded_task_is_the_task_alone(build: Callable[[Problem], Algorithm]) -> None:
    check(build)


@pytest.mark.parametrize("norm", ["support", "support_plus_one", "running"])
@pytest.mark.parametrize("name", ["r2d2", "maml", "anil", "relationnet"])
def test_whatever_normalises_the_queries(name: str, norm: str) -> None:
    check((HEADS | DESCENTS)[name], norm)


@pytest.mark.parametrize(
    "mode", ["checkpoint", "mixed", Truncated(1), Implicit(2.0, "cg", 3)], ids=str
)
def test_in_every_gradient_mode(mode: Any) -> None:
    check(DESCENTS["maml"], gradient=mode)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_imaml(variant: str) -> None:
    check(descent("imaml", variant=variant), gradient=Implicit(2.0, "cg", 3))


@pytest.mark.parametrize("name", ["maml", "proto_maml"])
def test_an_inner_adam_with_learned_rates(name: str) -> None:
    check(DESCENTS[name], optimizer=adam(0.01), learn=("lr",), granularity="parameter_step")


def test_a_loss_by_shots_is_a_sum_over_queries_over_the_mean_shot() -> None:
    made = builder("maml", outer_reduction="per_shot")(problem(None))
    mean = builder("maml")(problem(None))
    meta, (way, task) = moved(made), alone(0)
    loss, expected = (one.loss(meta, padded(task))[0] for one in (made, mean))
    factor = len(task.query_y) / (len(task.support_y) / way)
    torch.testing.assert_close(loss, factor * expected, **CLOSE)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["matchingnet", "r2d2", "maml"])
def test_tasks_of_several_shapes_are_one_batch(name: str, batching: Any, record: bool) -> None:
    """Under vmap and in a loop, and replayed for tasks of other shapes than were recorded."""
    build = (HEADS | DESCENTS)[name]
    made = build(problem(None))
    program = mean_gradient(made.loss, batching, record=recorded if record else unrecorded)
    meta = moved(made)
    for places in ((0, 1), (2, 0)):
        tasks = [padded(alone(place)[1]) for place in places]
        batch = Episodes(*(torch.stack(parts) for parts in zip(*tasks, strict=True)))
        grads, _ = program(meta, batch)
        losses = []
        for place in places:
            way, task = alone(place)
            losses.append(build(problem(way)).loss(meta, task)[0])
        expected = gradient(torch.stack(losses).mean(), meta)
        found = [grads[n] for n, v in meta.items() if v.requires_grad]
        torch.testing.assert_close(found, expected, **CLOSE)


def test_the_objective_is_that_of_the_known_examples() -> None:
    plain, scores = OBJECTIVES["classification"], numbers(6, 4)
    labels = torch.tensor([0, 2, 1, -1, 1, -1])
    own = over_known(plain)
    shown = without_absent(scores, torch.tensor([0, 1, 1, 2, -1]))
    kept = known(labels)
    expected = F.cross_entropy(scores[kept][:, :3], labels[kept])
    torch.testing.assert_close(own.loss(shown, labels), expected, **CLOSE)
    right = (scores[kept][:, :3].argmax(1) == labels[kept]).double().mean()
    assert own.score(shown, labels) == right
    assert own.score(torch.full((6, 4), torch.nan), labels).isnan()


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 2, 2)])
def test_batch_normalisation_over_known_examples(shape: tuple[int, ...]) -> None:
    layer, x = BatchNorm(3).double(), numbers(*shape)
    counted = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()
    with counting(counted):
        found = layer(x)
    torch.testing.assert_close(found[counted], layer(x[counted]), **CLOSE)
    with counting(counted[:5]), pytest.raises(UnsuitableModel, match="7 examples where there are"):
        layer(x)


def test_heads_of_padding_move_no_others() -> None:
    heads = {"weight": numbers(4, 5), "bias": numbers(4)}
    by_parts = partition([("weight", sgd(0.1)), ("bias", adam(0.1))])
    for apart in (sgd(0.1, momentum=0.9), adam(0.1), by_parts):
        assert moves_rows_apart(apart, heads, {})
    of_body = partition([("body", adafactor()), (("weight", "bias"), adam(0.1))])
    assert moves_rows_apart(of_body, heads, {"body": numbers(3, 3)})
    assert not moves_rows_apart(adafactor(), heads, {})
    of_head = partition([("weight", adafactor()), ("bias", sgd(0.1))])
    assert not moves_rows_apart(of_head, heads, {})
    for name in ("proto_maml", "baseline", "baseline_pp"):
        with pytest.raises(ValueError, match=f"moves the head of a class .* algo={name} has"):
            DESCENTS[name](problem(None, optimizer=adafactor()))


TESTED = {name.replace(",", " ").split()[0] for name in (*HEADS, *DESCENTS)} | {"imaml"}
OTHERS = sorted(
    name
    for name, kind in schemas("algo").items()
    if kind.__module__.startswith("metarun.") and name not in TESTED
)


@pytest.mark.parametrize("name", OTHERS)
def test_who_is_not_tested_here_takes_no_uneven_tasks(name: str) -> None:
    of_examples = "these data have tasks"
    other = {"cnp": "predicts numbers", "look_ahead": of_examples, "supervised": of_examples}
    said = other.get(name, rf"task.min_way=2: algo={name} does not leave out what pads")
    with pytest.raises(ConfigError, match=said):
        setup_of(f"algo={name}", *GLYPHS)


def test_a_setting_decides_who_takes_uneven_tasks() -> None:
    with pytest.raises(ConfigError, match=r"task.train.imbalanced=true: algo=reptile does not"):
        setup_of("algo=reptile", "algo.inner_batch=1", *GLYPHS[:4], "task.train.imbalanced=true")
    for name, own, other in (
        ("matchingnet", "algo.full_context=true", "algo.full_context=false"),
        ("metaoptnet", "algo.head=svm", "algo.head=ridge"),
        ("baseline_pp", "algo.inner_batch=4", "algo.inner_batch=null"),
        ("nearest_neighbour", "algo.k=2", "algo.k=1"),
    ):
        with pytest.raises(ConfigError, match=rf"task.min_way=2: algo={name} .* give {other}, or"):
            setup_of(f"algo={name}", own, *GLYPHS)
        setup_of(f"algo={name}", other, *GLYPHS)


def test_data_without_classes_to_leave_out_are_refused() -> None:
    curves = ("data=sinusoid", "backbone=mlp", "backbone.hidden=[4]", "algo=maml")
    with pytest.raises(ConfigError, match=r"task.min_shot=1: the tasks of data=sinusoid have one"):
        setup_of(*curves, "task.shot=5", "task.min_shot=1")
    with pytest.raises(ConfigError, match=r"task.train.min_shot=1: the tasks of data=sinusoid"):
        setup_of(*curves, "task.shot=5", "task.train.min_shot=1")


def test_a_network_that_mixes_examples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixes(self: BatchNorm, x: Tensor) -> Tensor:
        return x - x.mean(0)

    monkeypatch.setattr(BatchNorm, "forward", mixes)
    with pytest.raises(ConfigError, match=r"task.min_way=2: what backbone=mlp_bn gives for an ex"):
        setup_of("algo=protonet", *GLYPHS)


CONV = ("backbone=conv4", "backbone.width=3")


@pytest.mark.parametrize(
    ("algo", "network"), [("protonet", ()), ("maml", ()), ("maml", CONV)], ids=str
)
def test_an_evaluation_is_of_the_tasks_alone(algo: str, network: tuple[str, ...]) -> None:
    given = [own for own in GLYPHS if not network or ("mlp_bn" not in own and "hidden" not in own)]
    setup = setup_of(f"algo={algo}", *given, *network)
    meta = {name: value.detach() for name, value in stirred(setup).items()}
    batch = setup.source.sample("val", 0, 3)
    found = setup.trace(meta, batch)
    assert len(batch.support_y.amax(1).unique()) > 1, "they have several ways"
    for place in range(3):
        task = Episodes(*(part[place] for part in batch))
        of_support, of_query = known(task.support_y), known(task.query_y)
        cut = Episodes(
            task.support_x[of_support],
            task.support_y[of_support],
            task.query_x[of_query],
            task.query_y[of_query],
        )
        with torch.no_grad():
            expected = setup.algorithm.trace(meta, cut)  # nothing pads it
        own = Trace(found.query_loss[place], found.query_score[place])
        torch.testing.assert_close(own, expected, **CLOSE)


def test_a_short_training_on_uneven_tasks_helps() -> None:
    setup = setup_of(
        "algo=protonet", *GLYPHS, "backbone.hidden=[32]", "trainer.meta_batch=4",
        "engine.compile=replay", "outer_opt.lr=0.01",
    )  # fmt: skip
    state = fresh(setup)
    start = evaluate_split(setup, setup.trace, state.meta, "test", 60, lambda done: None)
    for _ in range(25):
        meta_step(setup, state)
    end = evaluate_split(setup, setup.trace, state.meta, "test", 60, lambda done: None)
    assert end.score - end.ci95 > start.score + start.ci95
