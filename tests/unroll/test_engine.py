"""The unroll: meta-gradients against finite differences, gradient modes, hyperparameters."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.components.data.sinusoid import Sinusoids
from metarun.episodes.source import Episodes
from metarun.unroll import (
    InnerOptimizer,
    adam,
    group_hyper,
    learn_hyper,
    map_tasks,
    match_names,
    meta_gradient,
    sgd,
    unroll,
)

F64 = torch.float64


def network() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MLP((1,), 1, hidden=(7,)).double()
    return model, {k: v.detach().requires_grad_() for k, v in model.named_parameters()}


def tasks(count: int) -> Episodes:
    source = Sinusoids(shot=6, query=4, seed=3, device=torch.device("cpu"), dtype=F64)
    return source.sample("train", 0, count)


def mse(model: torch.nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (functional_call(model, params, (x,)) - y).pow(2).mean()


def task_loss(model, optimizer: InnerOptimizer, steps: int, **options):
    def loss(meta: dict[str, Tensor], task: Episodes) -> tuple[Tensor, Tensor]:
        result = unroll(
            lambda p, step: mse(model, p, task.support_x, task.support_y),
            dict(meta),
            optimizer,
            steps,
            **options,
        )
        return mse(model, result.params, task.query_x, task.query_y), result.losses

    return loss


OPTIMIZERS = {
    "sgd": sgd(0.05),
    "momentum": sgd(0.05, momentum=0.8, weight_decay=0.01),
    "nesterov": sgd(0.05, momentum=0.8, nesterov=True),
    "adam": adam(0.05, beta1=0.8, beta2=0.9, eps=1e-4),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_second_order_meta_gradient_agrees_with_finite_differences(
    optimizer: InnerOptimizer,
) -> None:
    model, meta = network()
    task = Episodes(*(x[0] for x in tasks(1)))
    loss = task_loss(model, optimizer, 3)

    def of(*values: Tensor) -> Tensor:
        return loss(dict(zip(meta, values, strict=True)), task)[0]

    assert torch.autograd.gradcheck(of, list(meta.values()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_first_order_is_the_derivative_with_the_inner_gradients_held_constant(
    optimizer: InnerOptimizer,
) -> None:
    """An oracle of its own: replay the optimizer on recorded gradients, in plain autograd."""
    model, meta = network()
    task = Episodes(*(x[0] for x in tasks(1)))
    loss, _ = task_loss(model, optimizer, 3, gradient="first_order")(meta, task)
    ours = torch.autograd.grad(loss, list(meta.values()))

    params, state = dict(meta), optimizer.init(meta)
    for _ in range(3):
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        inner = mse(model, leaves, task.support_x, task.support_y)
        grads = dict(zip(leaves, torch.autograd.grad(inner, list(leaves.values())), strict=True))
        params, state = optimizer.update(grads, state, params, optimizer.hyper)
    expected_loss = mse(model, params, task.query_x, task.query_y)
    expected = torch.autograd.grad(expected_loss, list(meta.values()))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=0)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_first_order_and_second_order_differ() -> None:
    model, meta = network()
    task = Episodes(*(x[0] for x in tasks(1)))
    gradients = []
    for mode in ("reverse", "first_order"):
        loss, _ = task_loss(model, sgd(0.05), 2, gradient=mode)(meta, task)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, meta.values())]))
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


def test_first_order_builds_no_graph_for_the_inner_loss() -> None:
    model, meta = network()
    task = Episodes(*(x[0] for x in tasks(1)))
    _, losses = task_loss(model, sgd(0.05), 2, gradient="first_order")(meta, task)
    assert not losses.requires_grad


def test_no_grad_around_an_unroll_keeps_no_graph_but_takes_the_same_steps() -> None:
    model, meta = network()
    task = Episodes(*(x[0] for x in tasks(1)))
    with torch.no_grad():
        loss, losses = task_loss(model, sgd(0.05), 3)(meta, task)
    assert not loss.requires_grad and not losses.requires_grad
    torch.testing.assert_close(loss, task_loss(model, sgd(0.05), 3)(meta, task)[0].detach())
    assert losses[2] < losses[0], "the inner steps did nothing"


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("granularity", ["global", "parameter", "step", "parameter_step"])
def test_learned_lr_has_the_right_derivative_at_every_granularity(make, granularity: str) -> None:
    model, meta = network()
    task = Episodes(*(x[0] for x in tasks(1)))
    optimizer = make(lr=0.05) if make is sgd else make(lr=0.05, eps=1e-3)
    learned = learn_hyper(optimizer.hyper, ["lr"], granularity, meta, steps=2)
    names = list(learned.initial)
    count = {"global": 1, "parameter": 4, "step": 1, "parameter_step": 4}[granularity]
    assert len(names) == count
    by_step = granularity in ("step", "parameter_step")
    assert all(v.shape == ((2,) if by_step else ()) for v in learned.initial.values())

    def of(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        start = {k: v.detach() for k, v in meta.items()}
        result = unroll(
            lambda p, step: mse(model, p, task.support_x, task.support_y),
            start,
            optimizer,
            3,  # one more than learned: the last step's value serves
            hyper=lambda step: learned.at(given, step),
        )
        return mse(model, result.params, task.query_x, task.query_y)

    leaves = [learned.initial[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(of, leaves)
    assert all((g != 0).all() for g in torch.autograd.grad(of(*leaves), leaves))
    plain = unroll(
        lambda p, step: mse(model, p, task.support_x, task.support_y), dict(meta), optimizer, 3
    )
    same = mse(model, plain.params, task.query_x, task.query_y)
    torch.testing.assert_close(of(*leaves), same, rtol=1e-13, atol=0)


def test_groups_change_the_settings_of_the_parameters_they_match() -> None:
    _, meta = network()
    groups = {"head.*": {"lr": 0.5}, "*.bias": {"lr": 0.1, "weight_decay": 0.0}}
    optimizer = sgd(lr=0.01, weight_decay=0.02)
    hyper = group_hyper(optimizer.hyper, groups, list(meta))
    assert hyper["lr"] == {
        "body.0.weight": 0.01,
        "body.0.bias": 0.1,
        "head.weight": 0.5,
        "head.bias": 0.5,  # the first group that matches
    }
    assert hyper["weight_decay"]["head.bias"] == 0.0  # the first that matches and sets it
    assert hyper["momentum"] == 0.0
    ones = {k: torch.ones_like(v) for k, v in meta.items()}
    moved, _ = optimizer.update(ones, optimizer.init(meta), meta, hyper)
    assert torch.allclose(meta["head.bias"] - moved["head.bias"], torch.tensor(0.5, dtype=F64))


def test_a_learned_global_lr_is_one_value_for_each_group() -> None:
    _, meta = network()
    groups = {"head.*": {"lr": 0.5}}
    hyper = group_hyper(sgd(lr=0.01).hyper, groups, list(meta))
    learned = learn_hyper(hyper, ["lr"], "global", meta, 1, groups)
    values = {k: v.item() for k, v in learned.initial.items()}
    assert values == {"lr": 0.01, "lr/head.*": 0.5}


PAIR = {"a": torch.ones(3, dtype=F64), "b": torch.ones(2, 3, dtype=F64)}


@pytest.mark.parametrize("granularity", ["global", "step"])
def test_one_learned_value_cannot_stand_for_values_that_differ(granularity: str) -> None:
    by_step = "parameter_step" if granularity == "step" else "parameter"
    groups = {"b": {"lr": 0.5}}
    vectors = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([0.1, 0.2, 0.4])}
    for lr in (group_hyper(sgd(0.1).hyper, groups, list(PAIR))["lr"], vectors):
        with pytest.raises(ValueError, match=f"one 'lr' .* groups .* granularity '{by_step}'"):
            learn_hyper({"lr": lr}, ["lr"], granularity, PAIR, 2)
    shapes = {"a": torch.tensor(0.1), "b": torch.tensor([0.1])}
    with pytest.raises(ValueError, match="values that differ"):
        learn_hyper({"lr": shapes}, ["lr"], granularity, PAIR, 2)
    other = {"a": {"lr": 0.5}, "b": {"lr": 0.5}}  # equal values, of groups of their own
    hyper = group_hyper(sgd(0.1).hyper, other, list(PAIR))
    assert learn_hyper(hyper, ["lr"], granularity, PAIR, 2).initial["lr"].unique() == 0.5
    equal = {"a": vectors["a"], "b": vectors["a"].clone()}
    assert set(learn_hyper({"lr": equal}, ["lr"], granularity, PAIR, 2).initial) == {"lr"}


@pytest.mark.parametrize("granularity", ["step", "parameter_step"])
def test_a_value_with_dimensions_is_learned_for_each_step(granularity: str) -> None:
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    learned = learn_hyper({"lr": lr}, ["lr"], granularity, PAIR, 2)
    assert all(torch.equal(v, torch.stack([lr, lr])) for v in learned.initial.values())
    changed = {key: torch.stack([lr, -lr]) for key in learned.initial}
    for step, expected in enumerate([lr, -lr, -lr]):
        assert all(torch.equal(v, expected) for v in learned.at(changed, step)["lr"].values())


@pytest.mark.parametrize("granularity", ["step", "parameter_step"])
def test_later_steps_use_the_last_learned_value(granularity: str) -> None:
    learned = learn_hyper(sgd(0.1).hyper, ["lr"], granularity, PAIR, 3)
    values = {key: torch.tensor([1.0, 2.0, 3.0]) for key in learned.initial}
    used = [set(map(float, learned.at(values, step)["lr"].values())) for step in range(6)]
    assert used == [{1.0}, {2.0}, {3.0}, {3.0}, {3.0}, {3.0}]


@pytest.mark.parametrize("granularity", ["global", "parameter", "step", "parameter_step"])
def test_parameters_without_a_value_have_none_to_learn(granularity: str) -> None:
    hyper = {"trust_radius": {"a": 1.0}}
    learned = learn_hyper(hyper, ["trust_radius"], granularity, PAIR, 1)
    by_parameter = granularity.startswith("parameter")
    assert set(learned.initial) == {"trust_radius/a" if by_parameter else "trust_radius"}
    assert set(learned.at(learned.initial, 0)["trust_radius"]) == {"a"}
    with pytest.raises(ValueError, match="'trust_radius': no parameter has a value"):
        learn_hyper({"trust_radius": {}}, ["trust_radius"], granularity, PAIR, 1)


@pytest.mark.parametrize(
    ("groups", "message"),
    [({"tail.*": {"lr": 0.1}}, "no parameter matches 'tail"), ({"*": {"speed": 1.0}}, "speed")],
)
def test_wrong_groups_are_refused(groups: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_hyper(sgd().hyper, groups, list(network()[1]))


def test_patterns_choose_parameters_in_their_order() -> None:
    names = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert match_names(names, ["head.*", "*.bias"]) == ["body.0.bias", "head.weight", "head.bias"]


def test_unknown_names_are_refused() -> None:
    _, meta = network()
    with pytest.raises(ValueError, match="cannot learn 'speed': choose from lr"):
        learn_hyper(sgd().hyper, ["speed"], "global", meta, 1)
    with pytest.raises(ValueError, match="unknown granularity 'element'"):
        learn_hyper(sgd().hyper, ["lr"], "element", meta, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"learn='lr': give a list of names, such as \['lr'\]"):
        learn_hyper(sgd().hyper, "lr", "global", meta, 1)
    with pytest.raises(ValueError, match="unknown gradient mode 'backward'"):
        unroll(lambda p, s: p["x"], {}, sgd(), 1, gradient="backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more"):
        unroll(lambda p, s: p["x"], {}, sgd(), -1)


def test_observe_sees_the_start_and_every_step_and_state_can_be_carried_on() -> None:
    loss = lambda p, step: (p["x"] ** 2).sum()  # noqa: E731
    start = {"x": torch.tensor([1.0, 2.0], dtype=F64)}
    optimizer = sgd(0.1, momentum=0.5)
    whole = unroll(loss, start, optimizer, 4, observe=lambda p: p["x"])
    assert len(whole.observed) == 5 and whole.losses.shape == (4,)
    assert torch.equal(whole.observed[0], start["x"])
    half = unroll(loss, start, optimizer, 2)
    rest = unroll(loss, half.params, optimizer, 2, state=half.state)
    assert torch.equal(rest.params["x"], whole.params["x"])
    nothing = unroll(loss, start, optimizer, 0)
    assert torch.equal(nothing.params["x"], start["x"]) and nothing.losses.shape == (0,)


def test_the_loss_is_told_the_step() -> None:
    seen: list[int] = []

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        seen.append(step)
        return params["x"].sum()

    unroll(loss, {"x": torch.ones(1)}, sgd(0.1), 3)
    assert seen == [0, 1, 2]


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    return float(difference / torch.cat([b[k].flatten() for k in b]).norm())


@pytest.mark.parametrize("order", ["reverse", "first_order"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_vmap_loop_and_chunks_give_one_meta_gradient(optimizer, order: str) -> None:
    model, meta = network()
    loss = task_loss(model, optimizer, 3, gradient=order)
    loop, extra = meta_gradient(loss, meta, tasks(7), "loop")
    for chunk in (None, 1, 3, 7, 100):
        other, other_extra = meta_gradient(loss, meta, tasks(7), "vmap", chunk)
        assert relative_difference(other, loop) < 1e-10
        torch.testing.assert_close(other_extra, extra, rtol=1e-10, atol=0)
    assert extra.shape == (7, 3)


@pytest.mark.parametrize("pool", ["stride", "max"])
def test_vmap_and_loop_agree_on_a_convolutional_network_with_batch_norm(pool: str) -> None:
    torch.manual_seed(0)
    model = Conv4((1, 16, 16), 3, width=6, pool=pool).double()
    meta = {k: v.detach().requires_grad_() for k, v in model.named_parameters()}
    labels = torch.arange(3).expand(4, 3)
    images = torch.rand(4, 3, 1, 16, 16, dtype=F64), torch.rand(4, 3, 1, 16, 16, dtype=F64)

    def loss(meta, task):
        sx, qx, y = task
        entropy = torch.nn.functional.cross_entropy
        fast = unroll(
            lambda p, s: entropy(functional_call(model, p, (sx,)), y), dict(meta), sgd(0.3), 2
        ).params
        return entropy(functional_call(model, fast, (qx,)), y), y

    batch = (*images, labels)
    loop, _ = meta_gradient(loss, meta, batch, "loop")
    mapped, _ = meta_gradient(loss, meta, batch, "vmap")
    assert relative_difference(mapped, loop) < 1e-10


@pytest.mark.parametrize(
    ("batching", "chunk"), [("loop", None), ("vmap", None), ("vmap", 2), ("vmap", 5)]
)
def test_the_meta_gradient_is_that_of_the_mean_loss(batching, chunk: int | None) -> None:
    model, meta = network()
    loss = task_loss(model, sgd(0.05), 2)
    ours, _ = meta_gradient(loss, meta, tasks(5), batching, chunk)
    mean = vmap(lambda task: loss(meta, task)[0])(tasks(5)).mean()
    expected = torch.autograd.grad(mean, list(meta.values()))
    assert relative_difference(ours, dict(zip(meta, expected, strict=True))) < 1e-12


def test_a_meta_parameter_without_influence_has_gradient_zero() -> None:
    meta = {"a": torch.ones((), requires_grad=True), "b": torch.ones((), requires_grad=True)}
    grads, _ = meta_gradient(lambda m, t: (m["a"] * t, t), meta, torch.tensor([1.0, 3.0]), "loop")
    assert grads["a"] == 2 and grads["b"] == 0


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_map_tasks_stacks_results_in_order(batching: str) -> None:
    meta = {"a": torch.tensor(2.0)}
    doubled, same = map_tasks(lambda m, t: (m["a"] * t, t), meta, torch.arange(5.0), batching, 2)
    assert doubled.tolist() == [0, 2, 4, 6, 8] and same.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("run", [map_tasks, meta_gradient])
def test_wrong_batching_and_chunks_are_refused(run) -> None:
    given = lambda m, t: (m["a"] * t, t), {"a": torch.ones(())}, torch.arange(3.0)
    with pytest.raises(ValueError, match="unknown batching 'Vmap': choose one of vmap, loop"):
        run(*given, "Vmap")
    for batching in ("vmap", "loop"):
        for chunk in (0, -1):
            with pytest.raises(ValueError, match=f"chunk={chunk}: must be 1 or more"):
                run(*given, batching, chunk)
