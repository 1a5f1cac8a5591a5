"""Differentiable torch optimizers: torch's own steps, right derivatives, clear refusals."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metarun.higher as higher
from metarun.higher.optim import (
    DifferentiableOptimizer,
    DifferentiableSGD,
    apply_trainable_opt_params,
    create_diff_optim,
    get_diff_optim,
    get_trainable_opt_params,
    register_optim,
)

F64 = torch.float64
SGD, Adam = torch.optim.SGD, torch.optim.Adam


@pytest.fixture(autouse=True)
def double() -> Any:
    """torch keeps numbers in an optimizer's state in its default type."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(net: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return (net(x).sin() + net(x).pow(2)).sum()


def leaf(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def params_after(
    net: nn.Module, opt: torch.optim.Optimizer, steps: int = 4, **options: Any
) -> list[Tensor]:
    with higher.innerloop_ctx(net, opt, **options) as (fmodel, diffopt):
        for step in range(steps):
            diffopt.step(loss_of(fmodel, step))
    return list(fmodel.parameters())


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.05, momentum=0.6, dampening=0.1, maximize=True),
    "Adam": lambda ps: Adam(ps, lr=0.05, eps=1e-3, amsgrad=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.2, foreach=False),
    "Adam, decoupled": lambda ps: Adam(ps, 0.05, weight_decay=0.2, decoupled_weight_decay=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.05),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=0.05, betas=(0.5, 0.7)),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=0.05),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.5),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.05, momentum=0.3, centered=True),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=0.05),
    "ASGD": lambda ps: torch.optim.ASGD(ps, lr=0.05, t0=1),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05),
    "Muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=0.05),
}


@pytest.mark.parametrize("already", [0, 2])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_steps_are_those_of_torch_from_a_fresh_and_from_a_used_optimizer(kind, already) -> None:
    net = model()
    opt = kind(list(net.parameters()))
    for step in range(already + 4):
        if step == already:
            found = params_after(copied := copy.deepcopy(net), twin(opt, net, copied))
        opt.zero_grad()
        loss_of(net, step - already).backward()
        opt.step()
    # torch's Muon orthogonalises in bfloat16, which gives the two the same rounding
    assert_same(found, list(net.parameters()))


@pytest.mark.parametrize("name", KINDS)
def test_torch_goes_on_from_where_the_unroll_stands(name: str) -> None:
    net, theirs = model(), model()

    def parts(net: nn.Module) -> list[Any]:
        first, second = list(net[0].parameters()), list(net[2].parameters())
        whole = [*first, *second]
        return whole if name == "Muon" else [{"params": second, "lr": 0.02}, {"params": first}]

    opt, torch_opt = KINDS[name](parts(net)), KINDS[name](parts(theirs))
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for step in range(2):
            diffopt.step(loss_of(fmodel, step))
    net.load_state_dict(fmodel.state_dict())
    opt.load_state_dict(diffopt.state_dict())
    for step in range(5):
        for some_net, some_opt in ((theirs, torch_opt), (net, opt))[: 1 + (step > 1)]:
            some_opt.zero_grad()
            loss_of(some_net, step).backward()
            some_opt.step()
    assert_same(list(net.parameters()), list(theirs.parameters()))


def twin(opt: torch.optim.Optimizer, net: nn.Module, other: nn.Module) -> torch.optim.Optimizer:
    """The optimizer in its present state, for the parameters of a copied model."""
    there = dict(zip(net.parameters(), other.parameters(), strict=True))
    result = copy.copy(opt)
    result.param_groups = [
        {**group, "params": [there[p] for p in group["params"]]} for group in opt.param_groups
    ]
    result.state = type(opt.state)(dict, {there[p]: dict(s) for p, s in opt.state.items()})
    return result


def test_every_optimizer_of_torch_is_there_or_says_why_not() -> None:
    net = model()
    with pytest.raises(ValueError, match="LBFGS has no differentiable version; there are: SGD"):
        get_diff_optim(torch.optim.LBFGS(net.parameters()), net.parameters())
    with pytest.raises(ValueError, match="register_optim adds one"):
        create_diff_optim(torch.optim.SparseAdam, {"lr": 0.1}, net.parameters())
    for name in torch.optim.__all__ if hasattr(torch.optim, "__all__") else dir(torch.optim):
        kind = getattr(torch.optim, name)
        skipped = ("Optimizer", "LBFGS", "SparseAdam")
        if (
            isinstance(kind, type)
            and issubclass(kind, torch.optim.Optimizer)
            and name not in skipped
        ):
            assert hasattr(higher.optim, f"Differentiable{name}"), name


def test_adams_beta2_hypergradient_is_that_of_finite_differences() -> None:
    """The bias correction is a part of it."""
    net = model()

    def outer(beta2: Tensor) -> Tensor:
        opt = Adam(net.parameters(), lr=0.1)
        override = {"betas": [(0.9, beta2)]}
        with higher.innerloop_ctx(net, opt, override=override) as (fmodel, diffopt):
            for step in range(3):
                diffopt.step(loss_of(fmodel, step))
            return loss_of(fmodel, 9)

    beta2 = leaf(0.99)
    (found,) = torch.autograd.grad(outer(beta2), beta2)
    h = 1e-5
    expected = (outer(leaf(0.99 + h)) - outer(leaf(0.99 - h))) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert abs(found) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_settings_take_the_steps_of_torch_at_their_values(kind: str) -> None:
    net = model()
    opt = KINDS[kind](list(net.parameters()))
    override = get_trainable_opt_params(opt)
    found = params_after(net, opt, override=override)
    lr = override["lr"]
    derivatives = torch.autograd.grad(sum(p.sin().sum() for p in found), lr)
    for step in range(4):
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()
    # Muon's bfloat16 rounds learned coefficients otherwise.
    tolerances = {"rtol": 0, "atol": 1e-2} if kind == "Muon" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found, list(net.parameters()), **tolerances)
    assert all(bool(d.isfinite()) and bool(d) for d in derivatives)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("Muon", "Rprop")])
def test_every_trainable_setting_has_the_derivative_of_finite_differences(kind: str) -> None:
    net = model()
    opt = KINDS[kind](list(net.parameters()))
    override = get_trainable_opt_params(opt)
    tensors = [(k, t) for k, values in override.items() for t in higher.utils.flatten(values)]

    def outer(*given: Tensor) -> Tensor:
        supply = iter(given)
        chosen = {
            key: [
                tuple(next(supply) for _ in v) if isinstance(v, tuple) else next(supply)
                for v in values
            ]
            for key, values in override.items()
        }
        params = params_after(net, opt, steps=3, override=chosen)
        return sum(p.sin().sum() for p in params)

    inputs = [t for _, t in tensors]
    assert "lr" in dict(tensors) and len(inputs) > 2
    with torch.no_grad():  # off zero, and off the kinks at whole numbers
        for t in inputs:
            t.mul_(0.9).add_(0.01)
    assert torch.autograd.gradcheck(outer, inputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "Muon"])
def test_meta_gradients_are_finite_where_gradients_are_exactly_zero(kind: str) -> None:
    net = model()
    net.append(nn.Linear(2, 2))  # its weights are in the loss, without influence
    opt = KINDS[kind](list(net.parameters()))
    override = get_trainable_opt_params(opt)
    context = higher.innerloop_ctx(net, opt, copy_initial_weights=False, override=override)
    with context as (fmodel, diffopt):
        for step in range(3):
            diffopt.step(loss_of(fmodel[:3], step) + 0 * fmodel[3].weight.sum())
        outer = sum(p.sin().sum() for p in fmodel.parameters())
    inputs = [*net.parameters(), *higher.utils.flatten(override)]
    grads = torch.autograd.grad(outer, inputs, materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)
    assert all(g.abs().sum() > 0 for g in grads[:4])


def test_settings_that_are_no_numbers_are_not_trainable() -> None:
    net = model()
    groups = [{"params": [p]} for p in net.parameters()]
    opt = Adam(groups, lr=torch.tensor(0.3), amsgrad=True, betas=(0.8, 0.9), capturable=False)
    override = get_trainable_opt_params(opt)
    assert set(override) == {"lr", "betas", "eps", "weight_decay"}
    assert [len(values) for values in override.values()] == [4] * 4
    leaves = higher.utils.flatten(override)
    assert all(t.requires_grad and t.is_leaf and t.shape == () for t in leaves)
    assert override["betas"][2] == (0.8, 0.9) and isinstance(override["betas"][2], tuple)
    assert override["lr"][0] is not opt.param_groups[0]["lr"]


def test_learned_settings_are_applied_to_the_optimizer() -> None:
    net = model()
    opt = SGD(
        [{"params": net[0].parameters()}, {"params": net[2].parameters()}], lr=0.1, momentum=0
    )
    apply_trainable_opt_params(opt, {"lr": [leaf(0.2), leaf(0.3)], "momentum": [leaf(0.7)]})
    assert [g["lr"] for g in opt.param_groups] == [0.2, 0.3]
    assert [g["momentum"] for g in opt.param_groups] == [0.7, 0.7], "an int setting was rounded"
    assert isinstance(opt.param_groups[0]["lr"], float)
    adam = Adam(net.parameters(), lr=torch.tensor(0.1))
    lr = adam.param_groups[0]["lr"]
    apply_trainable_opt_params(adam, {"lr": [leaf(0.4)], "betas": [(leaf(0.5), leaf(0.6))]})
    assert adam.param_groups[0]["lr"] is lr and lr == 0.4
    assert adam.param_groups[0]["betas"] == (0.5, 0.6)
    for wrong in ({"lr": [leaf(0.1)] * 3}, {"rate": [leaf(0.1)]}, {"betas": [leaf(0.5)]}):
        with pytest.raises(ValueError, match=r"a list has one value|cannot override|cannot apply"):
            apply_trainable_opt_params(adam, wrong)


def test_settings_keep_their_types() -> None:
    """Where nothing was learned, an optimizer is as before: there and back changes nothing."""
    net = model()
    for opt in (
        SGD(net.parameters(), lr=1, momentum=0, weight_decay=0, nesterov=False),
        Adam(
            net.parameters(), lr=torch.tensor(0.1), betas=(0.5, 0.9), weight_decay=0, foreach=None
        ),
        torch.optim.Adagrad(net.parameters(), lr=0.1, lr_decay=0),
    ):
        before = [dict(group) for group in opt.param_groups]
        apply_trainable_opt_params(opt, get_trainable_opt_params(opt))
        for group, was in zip(opt.param_groups, before, strict=True):
            for key in was.keys() - {"params"}:
                kinds = [list(map(type, higher.utils.flatten(x[key]))) for x in (group, was)]
                assert kinds[0] == kinds[1] and type(group[key]) is type(was[key]), key
                assert group[key] is was[key] or group[key] == was[key]
    opt = SGD(net.parameters(), lr=0.1, momentum=0)
    given = {"momentum": [leaf(2.0)], "nesterov": [True], "lr": [torch.tensor([0.2])]}
    apply_trainable_opt_params(opt, {**given, "weight_decay": [leaf(0.5)]})
    (group,) = opt.param_groups
    assert (
        repr([group[key] for key in ("momentum", "nesterov", "weight_decay")]) == "[2, True, 0.5]"
    )
    assert isinstance(group["lr"], float) and group["lr"] == pytest.approx(0.2)
    for wrong in ({"nesterov": [1]}, {"foreach": [True]}, {"lr": [True]}, {"lr": ["a"]}):
        with pytest.raises(ValueError, match="cannot apply"):
            apply_trainable_opt_params(opt, wrong)


def test_an_override_at_one_step_holds_for_that_step() -> None:
    net, opt = model(), None
    opt = SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, override={"lr": [0.2]}) as (fmodel, diffopt):
        moves = []
        for lr in (None, leaf(0.5), None):
            before = fmodel.fast_params
            override = None if lr is None else {"lr": [lr]}
            loss = loss_of(fmodel, 0)
            grads = torch.autograd.grad(loss, before, retain_graph=True)
            after = diffopt.step(loss, override=override)
            moves.append([(b - a) / g for a, b, g in zip(after, before, grads, strict=True)])
    for move, lr in zip(moves, (0.2, 0.5, 0.2), strict=True):
        assert_same(move, [torch.full_like(m, lr) for m in move])
    assert opt.param_groups[0]["lr"] == 0.1


def test_a_bare_value_overrides_all_groups() -> None:
    net = model()
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]
    expected = params_after(net, SGD(groups, lr=0.25))
    for lr in (torch.tensor(0.25), 0.25, torch.tensor([0.25, 0.25]), torch.tensor([0.25])):
        assert_same(params_after(net, SGD(groups, lr=0.1), override={"lr": lr}), expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"lr": [0.1, 0.2]}, "one for each of the 1 parameter groups, not 2"),
        ({"betas": (0.1, 0.2)}, "goes into a list"),
        ({"rate": [0.1]}, "cannot override 'rate': the optimizer's settings are lr"),
        ({"params": [0.1]}, "cannot override 'params'"),
    ],
)
def test_overrides_that_do_not_fit(override: dict, message: str) -> None:
    net = model()
    opt = Adam(net.parameters())
    with (
        pytest.raises(ValueError, match=message),
        higher.innerloop_ctx(net, opt, override=override),
    ):
        pass
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        with pytest.raises(ValueError, match=message):
            diffopt.step(loss_of(fmodel, 0), override=override)
        assert len(diffopt.step(loss_of(fmodel, 0))) == 4


def test_unknown_settings_of_a_param_group_are_refused() -> None:
    net = model()
    opt = SGD([{"params": net.parameters(), "lr_mult": 0.1}], lr=0.1)
    with pytest.raises(ValueError, match="lr_mult"):
        get_diff_optim(opt, net.parameters())


def test_mistakes_are_explained() -> None:
    net, other = model(), model()
    opt = SGD(net.parameters(), lr=0.1)
    with (
        pytest.raises(ValueError, match="not one of the model's"),
        higher.innerloop_ctx(other, opt),
    ):
        pass
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        with pytest.raises(ValueError, match="must be a scalar"):
            diffopt.step(fmodel(torch.randn(2, 3)))
        for unrelated in (loss_of(net, 0), loss_of(net, 0).detach()):
            with pytest.raises(ValueError, match="does not depend on any of the fast weights"):
                diffopt.step(unrelated)
        with pytest.raises(ValueError, match="grad_callback returned 3 of 4"):
            diffopt.step(loss_of(fmodel, 0), grad_callback=lambda grads: grads[1:])
    with pytest.raises(ValueError, match="give params= to step"):
        get_diff_optim(opt, net.parameters()).step(loss_of(net, 0))
    with pytest.raises(ValueError, match="give params= or fmodel="):
        create_diff_optim(SGD, {"lr": 0.1})
    with pytest.raises(ValueError, match="give params= or fmodel="):
        create_diff_optim(SGD, {"lr": 0.1}, [])
    with pytest.raises(ValueError, match="3 tensors, fmodel 4 parameters"):
        create_diff_optim(SGD, {"lr": 0.1}, list(net.parameters())[1:], fmodel)
    table = nn.Embedding(3, 2, sparse=True)
    diffopt = create_diff_optim(SGD, {"lr": 0.1}, table.parameters(), track_higher_grads=False)
    with pytest.raises(ValueError, match="sparse=False"):
        diffopt.step(table(torch.tensor([1])).sum(), params=table.parameters())


@pytest.mark.parametrize("track", [True, False])
def test_frozen_and_unused_parameters_do_not_move_and_need_no_state(track: bool) -> None:
    """Momentum and weight decay would move them; torch leaves parameters without gradient."""
    net = model()
    net.append(nn.Linear(2, 2))  # not called
    net[0].weight.requires_grad_(False)
    opt = Adam(net.parameters(), lr=0.1, weight_decay=0.1)
    seen = []
    with higher.innerloop_ctx(net, opt, track_higher_grads=track) as (fmodel, diffopt):
        for step in range(2):
            loss = loss_of(fmodel[:3], step)
            diffopt.step(loss, grad_callback=lambda grads: seen.append(grads) or grads)
    fixed = {"0.weight", "3.weight", "3.bias"}
    for name, p in fmodel.named_parameters():
        start = dict(net.named_parameters())[name]
        assert torch.equal(p, start) == (name in fixed)
        assert p.requires_grad == start.requires_grad
    names = [name for name, _ in net.named_parameters()]
    assert [name for name, g in zip(names, seen[0], strict=True) if g is None] == [
        name for name in names if name in fixed
    ]


def test_a_parameter_that_joins_later_has_a_step_count_of_its_own() -> None:
    net = model()
    opt = Adam(net.parameters(), lr=0.1)
    theirs = copy.deepcopy(net)
    torch_opt = Adam(theirs.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for step in range(4):
            part = slice(0, 1) if step < 2 else slice(0, 3)
            diffopt.step(loss_of(fmodel[part], step))
            torch_opt.zero_grad()
            loss_of(theirs[part], step).backward()
            torch_opt.step()
    assert_same(list(fmodel.parameters()), list(theirs.parameters()))


class Signed(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


class DifferentiableSigned(DifferentiableOptimizer):
    """As users of `higher` write them."""

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
        for group_idx, (group, grads) in enumerate(
            zip(self.param_groups, grouped_grads, strict=True)
        ):
            for p_idx, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is None:
                    continue
                state = self.state[group_idx][p_idx]
                if len(state) == 0:
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(p)
                state["step"] += 1
                state["mean"] = state["mean"] * 0.5 + g
                group["params"][p_idx] = p - group["lr"] * state["mean"].tanh() / state["step"]


def test_a_users_own_optimizer() -> None:
    net = model()
    opt = Signed(net.parameters())
    with pytest.raises(ValueError, match="Signed has no differentiable version"):
        get_diff_optim(opt, net.parameters())
    register_optim(Signed, DifferentiableSigned)
    lr = leaf(0.3)
    with higher.innerloop_ctx(net, opt, override={"lr": [lr]}) as (fmodel, diffopt):
        assert type(diffopt) is DifferentiableSigned
        for step in range(3):
            diffopt.step(loss_of(fmodel, step), override={"lr": [leaf(9.0)]} if step == 1 else None)
        (found,) = torch.autograd.grad(loss_of(fmodel, 3), lr)
    assert diffopt.state[0][0]["step"] == 3 and found != 0
    saved = diffopt.state_dict()
    assert saved["state"][3]["step"] == 3 and not saved["state"][3]["mean"].requires_grad
    assert saved["param_groups"] == [{"params": [0, 1, 2, 3], "lr": lr}]
    assert all(p is None for group in diffopt.param_groups for p in group["params"])
    created = create_diff_optim(Signed, {"lr": 0.2}, params=list(net.parameters()))
    assert created.param_groups[0]["lr"] == 0.2


def test_the_mask_for_ones_own_optimizers_holds_for_higher_derivatives_too() -> None:
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    y = 1.0 * x
    y.register_hook(higher.optim._get_mask_closure(x == 0))
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    assert_same(first, torch.tensor([0.0, 12.0]))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_same(second, torch.tensor([0.0, 12.0]))


def test_an_optimizer_from_scratch_with_groups_of_the_patched_models_parameters() -> None:
    net = model()
    fmodel = higher.monkeypatch(net)
    w0, b0, w2, b2 = fmodel.parameters()
    diffopt = create_diff_optim(
        SGD, {"lr": 0.1}, [{"params": [b2, w0], "lr": 0.5}, {"params": w2}], fmodel=fmodel
    )
    loss = loss_of(fmodel, 0)
    grads = torch.autograd.grad(loss, [w0, b0, w2, b2], retain_graph=True)
    found = diffopt.step(loss)
    rates = (0.5, 0.0, 0.1, 0.5)
    assert_same(found, [p - r * g for p, r, g in zip((w0, b0, w2, b2), rates, grads, strict=True)])


def test_the_constructor_takes_a_callback_and_a_state_for_each_device() -> None:
    net = model()
    opt = SGD(net.parameters(), lr=0.1, momentum=0.9)
    loss_of(net, 0).backward()
    opt.step()
    halved = DifferentiableSGD(
        opt,
        net.parameters(),
        device="cpu",
        grad_callback=lambda grads: [g / 2 for g in grads],
    )
    buffer = halved.state[0][0]["momentum_buffer"]
    assert_same(buffer, opt.state[net[0].weight]["momentum_buffer"])
    assert buffer is not opt.state[net[0].weight]["momentum_buffer"]
    params = list(net.parameters())
    loss = loss_of(net, 1)
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    new = halved.step(loss, params=params)
    assert_same(new[0], params[0] - 0.1 * (0.9 * buffer + grads[0] / 2))
    assert_same(halved.state[0][0].momentum, 0.9 * buffer + grads[0] / 2)
    again = halved.step(loss_of(net, 1), params=params, grad_callback=lambda grads: grads)
    velocity = 0.9 * (0.9 * buffer + grads[0] / 2) + grads[0]
    assert_same(again[0], params[0] - 0.1 * velocity)


def test_hooks_of_an_optimizer_are_refused() -> None:
    net = model()
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        optimizer = SGD(net.parameters(), lr=0.1)
        getattr(optimizer, register)(lambda *given: None)
        with pytest.raises(ValueError, match="the optimizer has hooks"):
            get_diff_optim(optimizer, net.parameters())


def test_a_hook_of_a_parameter_sees_its_meta_gradient_alone() -> None:
    net, seen = model(), list[Tensor]()
    x = torch.ones(2, next(net.parameters()).shape[1])
    weight = next(net.parameters())
    weight.register_hook(seen.append)
    context = higher.innerloop_ctx(net, SGD(net.parameters(), lr=0.1), copy_initial_weights=False)
    with context as (fnet, optimizer):
        optimizer.step(fnet(x).square().sum())
        assert not seen
        fnet(x).square().sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], weight.grad)


def test_all_settings_of_nesterov_can_be_learned() -> None:
    """Its dampening begins at 0, and is no number then."""
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD([w], lr=0.1, momentum=0.9, nesterov=True)
    learned = get_trainable_opt_params(opt)
    inner = get_diff_optim(opt, [w], override=learned)
    stepped = w
    for _ in range(3):
        [stepped] = inner.step(stepped.square().sum(), params=[stepped])
    for _ in range(3):
        opt.zero_grad()
        w.square().sum().backward()
        opt.step()
    torch.testing.assert_close(stepped, w, rtol=1e-6, atol=0)
    [derivative] = torch.autograd.grad(stepped, learned["dampening"])
    assert bool(derivative.isfinite()) and bool(derivative)
