"""Proto-MAML and UNICORN-MAML, whose head is new in each task, against loops written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.training.setup import Setup
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

Meta = dict[str, Tensor]
HEADS = {"proto_maml": (), "unicorn_maml": ("algo.temperature=0.5",)}


def features(w: Meta, x: Tensor) -> Tensor:
    for i in range(4):
        name = f"body.{i}"
        x = F.conv2d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], stride=2, padding=1)
        gain, shift = w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]
        x = F.relu(F.batch_norm(x, None, None, gain, shift, training=True))
    return x.mean(dim=(-2, -1))


def new_head(algo: str, meta: Meta, task: Episodes, way: int) -> tuple[Tensor, Tensor]:
    if algo == "unicorn_maml":
        weight = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        return weight.repeat(way, 1), torch.full((way,), 0.7, dtype=torch.float64)
    support = features(meta, task.support_x)
    means = torch.stack([support[task.support_y == k].mean(0) for k in range(way)])
    return 2 * means, -(means.norm(dim=1) ** 2)


def by_hand(
    algo: str, meta: Meta, task: Episodes, steps: int, order: int, way: int = 3, head: Any = None
) -> Any:
    """Query losses before each inner step and after the last one, of steps of 0.1."""
    w = {n: v.clone() for n, v in meta.items() if n.startswith("body.")}  # not what means came of
    w["weight"], w["bias"] = new_head(algo, meta, task, way) if head is None else head
    for name in ("weight", "bias"):
        w[name].requires_grad_()
    scale, found = 2.0 if algo == "unicorn_maml" else 1.0, []
    for step in range(steps + 1):
        scores = F.linear(features(w, task.query_x), w["weight"], w["bias"])
        found.append(F.cross_entropy(scale * scores, task.query_y))
        if step < steps:
            own = F.linear(features(w, task.support_x), w["weight"], w["bias"])
            inner = F.cross_entropy(own, task.support_y)
            grads = torch.autograd.grad(
                inner, list(w.values()), create_graph=order == 2, retain_graph=True
            )
            w = {n: p - 0.1 * g for (n, p), g in zip(w.items(), grads, strict=True)}
    return found


def setup(algo: str, *more: str) -> Setup:
    steps = ("algo.inner_steps=2", "algo.eval_inner_steps=3", "inner_opt.lr=0.1", "task.shot=2")
    return setup_of(*IMAGES, f"algo={algo}", *steps, *HEADS[algo], *more)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("algo", HEADS)
def test_it_is_the_loop_written_out(algo: str, order: int) -> None:
    ours = setup(algo, f"algo.order={order}")
    meta, task = stirred(ours), task_of(ours)
    loss = ours.algorithm.loss(meta, task)[0]
    expected = by_hand(algo, meta, task, 2, order)[-1]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    both = (torch.autograd.grad(v, list(meta.values())) for v in (loss, expected))
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-10)
    trace = ours.algorithm.trace(meta, task).query_loss
    curve = torch.stack(by_hand(algo, meta, task, 3, 1)).detach()
    torch.testing.assert_close(trace, curve, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algo", HEADS)
def test_tasks_of_evaluation_may_have_another_way(algo: str) -> None:
    ours = setup(algo, "task.way=4", "task.train.way=2")
    assert ours.algorithm.any_way
    assert not any(name.startswith("head.") for name in ours.algorithm.init())
    meta, task = stirred(ours), task_of(ours)
    trace = ours.algorithm.trace(meta, task).query_loss
    curve = torch.stack(by_hand(algo, meta, task, 3, 1, way=4)).detach()
    torch.testing.assert_close(trace, curve, rtol=1e-9, atol=1e-11)
    grads, row = ours.gradient(meta, ours.train_tasks.sample(0, 2))
    assert row.loss.isfinite() and all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("algo", HEADS)
def test_per_shot_losses_count_the_classes_of_the_task(algo: str) -> None:
    """2 in training and 4 in evaluation."""
    shape = ("task.way=4", "task.train.way=2")
    summed = setup(algo, *shape, "algo.reduction=per_shot")
    twice = setup(algo, *shape, "inner_opt.lr=0.2")
    four = setup(algo, *shape, "inner_opt.lr=0.4")
    meta, task = stirred(summed), Episodes(*(x[0] for x in summed.train_tasks.sample(0, 1)))
    losses = [each.algorithm.loss(meta, task)[0] for each in (summed, twice)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    traces = [each.algorithm.trace(meta, task_of(summed)).query_loss for each in (summed, four)]
    torch.testing.assert_close(*traces, rtol=1e-9, atol=0)


def test_prototypes_start_as_a_prototypical_network() -> None:
    ours = setup("proto_maml", "algo.eval_inner_steps=0")
    plain = setup_of(*IMAGES, "algo=protonet", "task.shot=2")
    meta, task = stirred(ours), task_of(ours)
    traces = [each.algorithm.trace(meta, task).query_loss for each in (ours, plain)]
    torch.testing.assert_close(*traces, rtol=1e-9, atol=1e-12)


def test_the_order_of_classes_changes_nothing_of_unicorn_and_much_of_maml() -> None:
    order, found = torch.tensor([2, 0, 1]), {}
    for algo in ("unicorn_maml", "maml"):
        ours = setup_of(*IMAGES, f"algo={algo}", "task.shot=2", "algo.inner_steps=3")
        meta, task = stirred(ours), task_of(ours)
        renamed = order.argsort()
        other = task._replace(support_y=renamed[task.support_y], query_y=renamed[task.query_y])
        found[algo] = [ours.algorithm.loss(meta, t)[0].item() for t in (task, other)]
    assert found["unicorn_maml"][0] == pytest.approx(found["unicorn_maml"][1], rel=1e-11)
    assert found["maml"][0] != pytest.approx(found["maml"][1], rel=1e-3)


def test_the_vector_of_unicorn_drops_out_of_the_softmax() -> None:
    """So it is not learned; where all classes are alike at first, ties are exact."""
    ours = setup("unicorn_maml", "algo.order=2")
    meta, task = stirred(ours), task_of(ours)
    assert set(meta) == {name for name in stirred(setup("proto_maml"))}
    vector = torch.ones(1, 3, dtype=torch.float64).requires_grad_()
    head = (vector.repeat(3, 1), torch.zeros(3, dtype=torch.float64))
    last = by_hand("unicorn_maml", meta, task, 3, 2, head=head)[-1]
    assert torch.autograd.grad(last, vector)[0].abs().max() < 1e-14
    trace = ours.algorithm.trace(meta, task)
    assert float(trace.query_loss[0].detach()) == pytest.approx(math.log(3), rel=1e-14)
    assert float(trace.query_score[0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("algo", HEADS)
@pytest.mark.parametrize("more", [("inner_opt=adam",), ("inner_opt=partition",)])
def test_other_inner_optimizers_serve_the_new_head(algo: str, more: tuple[str, ...]) -> None:
    steps = ("task.shot=2", "algo.inner_steps=2")
    ours = setup_of(*IMAGES, f"algo={algo}", *steps, *more)
    grads, _ = ours.gradient(stirred(ours), ours.train_tasks.sample(0, 2))
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("algo", HEADS)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["inner_opt.precondition=meta_curvature"], "has a head of as many classes as a task"),
        (["algo.adapt=['body.*']"], "which must be adapted; add 'head"),
        (["algo.per_step=['head.*']"], "no parameter matches 'head"),
        (["algo.adapt=['nothing.*']"], "no parameter matches 'nothing"),
    ],
)
def test_what_cannot_be_is_refused(algo: str, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup(algo, *settings)


@pytest.mark.parametrize("algo", HEADS)
def test_a_regression_is_refused(algo: str) -> None:
    with pytest.raises(ConfigError, match=f"algo={algo} tells classes apart"):
        setup_of(*SINE, f"algo={algo}")


def test_a_temperature_is_positive() -> None:
    with pytest.raises(ConfigError, match=r"algo\.temperature=0\.0: must be above 0"):
        setup_of(*IMAGES, "algo=unicorn_maml", "algo.temperature=0.0")


def test_gain_and_shift_of_each_step_go_with_a_new_head() -> None:
    ours = setup("proto_maml", "algo.per_step=['*.norm.*']", "algo.order=2")
    meta, task = stirred(ours), task_of(ours)
    name = "body.3.norm.weight"
    assert meta[name].shape == (2, 3)
    plain = setup_of(*IMAGES, "algo=protonet", "task.shot=2")
    first = {n: v[0] if ".norm." in n else v for n, v in meta.items()}
    start = plain.algorithm.trace(first, task).query_loss[0]
    torch.testing.assert_close(ours.algorithm.trace(meta, task).query_loss[0], start)
    (grad,) = torch.autograd.grad(ours.algorithm.loss(meta, task)[0], meta[name])
    along = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = [
        float(ours.algorithm.loss(meta | {name: meta[name] + s * along}, task)[0].detach())
        for s in (1e-6, -1e-6)
    ]
    assert float((grad * along).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)
