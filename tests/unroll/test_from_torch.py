"""Going on from a live torch optimizer, and different optimizers for different parameters."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from metarun.higher import innerloop_ctx
from metarun.unroll import adam, from_torch, match_names, muon, partition, sgd, translate, unroll
from tests.unroll.optim_cases import CASES, EVERY_CASE, IDS, assert_same, loss_of, start

F64 = torch.float64


class Model(nn.Module):
    """The parameters of `start`, one that is frozen and one that no optimizer has."""

    def __init__(self, kind: type[Optimizer] | None = None) -> None:
        super().__init__()
        for name, value in start(kind).items():
            setattr(self, name, nn.Parameter(value))
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=F64), requires_grad=False)
        self.apart = nn.Parameter(torch.ones(2, 2, dtype=F64))

    def groups(self) -> list[dict[str, Any]]:
        first = {"params": [self.w, self.frozen, self.s], "lr": 0.05}
        return [first, {"params": [self.b, self.k]}]

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def torch_steps(optimizer: Optimizer, model: Model, steps: int, without: str = "") -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(dict(model.named_parameters())).backward()
        if without:
            model.get_parameter(without).grad = None  # torch skips it: no state yet
        optimizer.step()


def functional_loss(params: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    return loss_of(params)


@pytest.fixture(params=[torch.float32, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch rounds some of its numbers to this type (ASGD's eta, NAdam's momenta)."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(("kind", "options"), EVERY_CASE, ids=IDS)
def test_k_torch_steps_then_n_functional_ones_are_k_plus_n_torch_steps(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    for before, without in ((0, ""), (1, ""), (3, "b")):
        model = Model(kind)
        optimizer = kind(model.groups(), lr=0.03, **options)
        torch_steps(optimizer, model, before, without)
        continued = from_torch(optimizer, model)
        params = model.values()
        torch_steps(optimizer, model, 8)
        ours = unroll(functional_loss, params, continued.optimizer, 8, state=continued.state).params
        assert_same(ours, dict(model.named_parameters()))
        assert not torch.equal(ours["b"], params["b"])
        assert torch.equal(ours["frozen"], params["frozen"])
        assert torch.equal(ours["apart"], params["apart"])


@pytest.mark.parametrize("kind", CASES)
def test_the_live_optimizer_and_what_continues_it_are_independent(kind: type[Optimizer]) -> None:
    model = Model(kind)
    optimizer = kind(model.groups(), **CASES[kind][-1])
    torch_steps(optimizer, model, 2)
    params = model.values()
    continued = from_torch(optimizer, model.named_parameters())

    def ours() -> dict[str, torch.Tensor]:
        return unroll(functional_loss, params, continued.optimizer, 3, state=continued.state).params

    first = ours()
    torch_steps(optimizer, model, 3)  # in place, on its own state
    assert_same(ours(), first)


def test_the_continued_unroll_is_differentiable_and_its_groups_have_their_own_lr() -> None:
    model = Model()
    lr = torch.tensor(0.05, dtype=F64, requires_grad=True)
    groups = [{"params": [model.w], "lr": lr}, {"params": [model.b, model.k, model.s]}]
    optimizer = Adam(groups, lr=0.02, betas=(0.8, 0.9))
    torch_steps(optimizer, model, 2)
    continued = from_torch(optimizer, model)
    assert continued.optimizer.hyper["0.lr"] is not None
    assert continued.optimizer.hyper["1.lr"] == 0.02
    beta2 = torch.tensor(0.9, dtype=F64, requires_grad=True)

    def after(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        hyper = {**continued.optimizer.hyper, "0.lr": first, "1.beta2": second}
        end = unroll(
            functional_loss,
            model.values(),
            continued.optimizer,
            3,
            hyper=hyper,
            state=continued.state,
        )
        return loss_of(end.params)

    assert torch.autograd.gradcheck(after, [lr, beta2])
    end = unroll(
        functional_loss, model.values(), continued.optimizer, 3, state=continued.state
    ).params
    (gradient,) = torch.autograd.grad(loss_of(end), lr)  # the group's own tensor
    torch.testing.assert_close(gradient, torch.autograd.grad(after(lr, beta2), lr)[0])


def test_options_may_be_tensors_of_one_element() -> None:
    lr = torch.tensor([0.1], dtype=F64, requires_grad=True)
    beta2 = torch.tensor(0.9, dtype=F64, requires_grad=True)
    optimizer = translate(Adam, {"lr": lr, "betas": (0.5, beta2)})
    assert optimizer.hyper["lr"].shape == () and optimizer.hyper["beta2"] is not None
    moved = unroll(functional_loss, start(), optimizer, 2).params
    assert moved["s"].shape == ()
    gradients = torch.autograd.grad(loss_of(moved), [lr, beta2])
    assert all(g.abs().sum() > 0 for g in gradients)


def test_what_schedulers_note_in_a_group_is_passed_over() -> None:
    model = Model()
    optimizer = SGD(model.named_parameters(), lr=0.1, momentum=0.5)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=10)
    continued = from_torch(optimizer, model)
    assert continued.optimizer.hyper["0.lr"] == optimizer.param_groups[0]["lr"] != 0.1
    assert set(continued.optimizer.hyper) == {
        f"0.{name}" for name in ("lr", "momentum", "dampening", "weight_decay")
    }


def test_tied_parameters_have_one_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    continued = from_torch(SGD(model.parameters(), lr=0.1), model)
    assert set(continued.state[0]) == {"0.weight", "0.bias", "1.bias"}


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group 0 .* shape \(4, 3\) that is not among those"):
        from_torch(SGD(Model().parameters(), lr=0.1), Model())


def test_hooks_that_would_not_be_called_are_refused() -> None:
    model = Model()
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        optimizer = SGD(model.parameters(), lr=0.1)
        handle = getattr(optimizer, register)(lambda *given: None)
        with pytest.raises(ValueError, match="the optimizer has hooks"):
            from_torch(optimizer, model)
        handle.remove()
        from_torch(optimizer, model)
    name, weight = next(iter(model.named_parameters()))
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(weight, register)(lambda given: None)
        with pytest.raises(ValueError, match=f"{name} has a hook on its gradient"):
            from_torch(SGD(model.parameters(), lr=0.1), model)
        handle.remove()
        from_torch(SGD(model.parameters(), lr=0.1), model)


def test_an_optimizer_without_counterpart_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="LBFGS cannot be unrolled: it evaluates the loss"):
        from_torch(torch.optim.LBFGS(model.parameters()), model)


def test_parts_are_the_optimizers_they_are_made_of() -> None:
    params = {name: p.requires_grad_() for name, p in start().items()}
    optimizer = partition(
        [(["w", "k"], sgd(0.05, momentum=0.5)), (["[a-b]", "s"], adam(0.02, eps=1e-3))]
    )
    assert optimizer.hyper["0.momentum"] == 0.5 and optimizer.hyper["1.lr"] == 0.02
    ours = unroll(functional_loss, start(), optimizer, 4)
    first = SGD([params["w"], params["k"]], lr=0.05, momentum=0.5)
    second = Adam([params["b"], params["s"]], lr=0.02, eps=1e-3)
    for _ in range(4):
        for p in params.values():
            p.grad = None
        loss_of(params).backward()
        first.step()
        second.step()
    assert_same(ours.params, params)
    assert list(ours.params) == list(params), "the order of the parameters changed"
    assert [set(part) for part in ours.state] == [{"w", "k"}, {"b", "s"}]


def test_a_matrix_optimizer_and_one_for_the_rest() -> None:
    model = nn.Linear(3, 2).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    optimizer = partition([(["*weight"], muon(0.1)), (["*bias"], sgd(0.1))])
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    moved, _ = optimizer.update(grads, optimizer.init(params), params, optimizer.hyper)
    alone = Muon([model.weight], lr=0.1)
    model.weight.grad = grads["weight"]
    alone.step()
    torch.testing.assert_close(moved["weight"], model.weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(["w", "b"], sgd()), (["[b-k]", "s"], sgd())], "b belongs to part 0 and to part 1"),
        ([(["w"], sgd()), (["[kb]"], sgd())], "no part of the partition matches s"),
        ([(["*"], sgd()), (["head.*"], sgd())], "no parameter matches 'head"),
    ],
)
def test_each_parameter_has_one_part(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition(parts).init(start())


def test_a_name_with_brackets_is_itself_and_no_pattern() -> None:
    names = ["a[0]", "a0", "a*", "ab"]
    assert match_names(names, ["a[0]"]) == ["a[0]"]
    assert match_names(names, ["a*"]) == ["a*"]
    assert match_names(names, ["a[!*]", "a?"]) == ["a0", "a*", "ab"]
    optimizer = partition([(["a[0]"], sgd(1.0)), (["a0"], sgd(0.0))])
    params = {"a[0]": torch.ones(1), "a0": torch.ones(1)}
    moved, _ = optimizer.update(params, optimizer.init(params), params, optimizer.hyper)
    assert moved["a[0]"] == 0 and moved["a0"] == 1


def test_adamw_of_torch_says_that_its_decay_is_decoupled() -> None:
    model = Model()
    continued = from_torch(AdamW(model.parameters(), weight_decay=0.3), model)
    assert continued.optimizer.hyper["0.weight_decay"] == 0.3


def taken_over(way: str, optimizer: Optimizer, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The loss after three further steps, by the engine or by its interface of higher."""

    def loss(params: dict[str, torch.Tensor], step: int = 0) -> torch.Tensor:
        return torch.func.functional_call(net, params, (x,)).square().sum()

    if way == "higher":
        with innerloop_ctx(net, optimizer) as (fnet, inner):
            for _ in range(3):
                inner.step(fnet(x).square().sum())
            return fnet(x).square().sum().detach()
    continued = from_torch(optimizer, net)
    params = dict(net.named_parameters())
    return loss(unroll(loss, params, continued.optimizer, 3, state=continued.state).params).detach()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


@pytest.mark.parametrize("way", ["unroll", "higher"])
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_adagrad_begins_with_the_value_it_was_made_with(way: str, start: float) -> None:
    """torch passes over what a group says of it."""
    x = torch.randn(5, 2, dtype=torch.float64)
    losses = []
    for theirs in (True, False):
        net = small_net()
        first, last = list(net.parameters())[:2], list(net.parameters())[2:]
        groups = [{"params": first, "initial_accumulator_value": 0.5}, {"params": last}]
        optimizer = torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=start)
        for _ in range(3 if theirs else 0):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        losses.append(net(x).square().sum() if theirs else taken_over(way, optimizer, net, x))
    torch.testing.assert_close(losses[1], losses[0].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", ["unroll", "higher"])
@pytest.mark.parametrize("case", EVERY_CASE, ids=IDS)
def test_a_step_that_was_set_back_to_0_is_that_of_torch_or_refused(way: str, case: Any) -> None:
    """What begins at the first step would begin again, and the sums so far be lost."""
    kind, options = case[:2]
    x = torch.randn(5, 2, dtype=torch.float64)

    def used() -> tuple[nn.Module, Optimizer]:
        net = small_net()
        if kind is Muon:
            net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
            torch.manual_seed(0)
            for p in net.parameters():
                nn.init.normal_(p)
        optimizer = kind(net.parameters(), **options)
        steps(net, optimizer)
        optimizer.zero_grad()
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
        return net, optimizer

    def steps(net: nn.Module, optimizer: Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    net, optimizer = used()
    if kind in (torch.optim.Adagrad, torch.optim.ASGD, torch.optim.Rprop):
        key = {"Adagrad": "sum", "ASGD": "eta", "Rprop": "step_size"}[kind.__name__]
        with pytest.raises(ValueError, match=f"at step 0, but its {key} is not that of a begin"):
            taken_over(way, optimizer, net, x)
        return
    found = taken_over(way, optimizer, net, x)
    net, optimizer = used()
    steps(net, optimizer)
    torch.testing.assert_close(found, net(x).square().sum().detach(), rtol=1e-9, atol=1e-12)
