"""`metarun.higher` against `higher` itself: the same code, models and data, the same numbers."""

import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metarun.higher

with warnings.catch_warnings():  # its sources are older than these Python versions
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import higher

F64 = torch.float64


@pytest.fixture
def double() -> Iterator[None]:
    """torch and `higher` keep the numbers of an optimizer's state in torch's default type."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x.view(-1, 1, 4, 4))).tanh()
        return self.head(x.flatten(1))


class Recurrent(nn.Module):
    """An LSTM over embedded tokens, with the embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.lstm = nn.LSTM(3, 3, num_layers=2, batch_first=True)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, :4] * 2).round().long().remainder(5)
        return self.out(self.lstm(self.embed(tokens))[0]).mean(1)


class FrozenAndUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(16, 6)
        self.fixed.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fixed(x).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2))


MODELS = {"mlp": mlp, "conv": ConvNet, "recurrent": Recurrent, "frozen": FrozenAndUnused}


def make(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model().double()


def batch(seed: int) -> Tensor:
    return torch.randn(6, 16, dtype=F64, generator=torch.Generator().manual_seed(seed))


def loss_of(output: Tensor) -> Tensor:
    return (output.sin() + output.pow(2)).mean() + output[:, 0].cos().sum()


def adapt(
    api: ModuleType,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    override: dict[str, Any] | None = None,
    steps: int = 3,
    callback: Callable[[list], list] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """An inner loop, and everything that can be asked of it afterwards."""
    learned = [x for values in (override or {}).values() for x in flat(values)]
    context = api.innerloop_ctx(model, optimizer, override=override, **options)
    with context as (fmodel, diffopt):
        losses = []
        for step in range(steps):
            losses.append(loss_of(fmodel(batch(step))))
            returned = diffopt.step(losses[-1], grad_callback=callback)
        outer = loss_of(fmodel(batch(99)))
    found: dict[str, Any] = {"losses": [*losses, outer], "final": list(fmodel.parameters())}
    assert all(a is b for a, b in zip(returned, fmodel.parameters(), strict=True))
    if options.get("track_higher_grads", True):
        found["history"] = [p for t in range(steps + 1) for p in fmodel.parameters(time=t)]
    sources = [
        *(p for p in fmodel.parameters(time=0) if p.requires_grad),
        *(p for p in model.parameters() if p.requires_grad),
        *learned,
    ]
    found["gradients"] = torch.autograd.grad(outer, sources, allow_unused=True)
    found["buffers"] = list(fmodel.buffers())
    found["named"] = [name for name, _ in fmodel.named_parameters()]
    return found


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values] if values.requires_grad else []
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else []


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours["named"] == theirs["named"]
    for key in ours.keys() - {"named"}:
        pairs = list(zip(ours[key], theirs[key], strict=True))
        assert pairs or key == "buffers"
        for a, b in pairs:
            assert (a is None) == (b is None), key
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def both(model: Callable[[], nn.Module], optimizer: Callable[..., Any], **options: Any) -> Any:
    results = []
    for api in (metarun.higher, higher):
        net = make(model)
        override = options.get("override")
        built = override() if callable(override) else override
        results.append(adapt(api, net, optimizer(net), **{**options, "override": built}))
    return results


SGD = torch.optim.SGD


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "connected"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_unroll_is_that_of_higher(model: Callable[[], nn.Module], copy: bool) -> None:
    ours, theirs = both(
        model,
        lambda net: SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.7),
        copy_initial_weights=copy,
    )
    assert_same(ours, theirs)
    reached = [g for g in ours["gradients"] if g is not None]
    assert len(reached) > 1 and all(g.abs().sum() > 0 for g in reached[:2])


OPTIMIZERS = {
    "sgd": lambda ps: SGD(ps, lr=0.1),
    "nesterov": lambda ps: SGD(ps, lr=0.1, momentum=0.6, nesterov=True, weight_decay=0.1),
    "dampened": lambda ps: SGD(ps, lr=0.1, momentum=0.6, dampening=0.2),
    # higher puts eps elsewhere than torch: its size makes the two differ, and nothing else
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1, eps=1e-20, weight_decay=0.1),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.1, betas=(0.5, 0.7), eps=1e-20, amsgrad=True),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0, rho=0.8, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, lr_decay=0.2, weight_decay=0.1),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.1, betas=(0.6, 0.8), weight_decay=0.1),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.1, lambd=0.05, t0=1, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, alpha=0.7, weight_decay=0.1),
    "centered": lambda ps: torch.optim.RMSprop(ps, lr=0.1, momentum=0.5, centered=True, eps=0.1),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.1),
}


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:Differentiable R:UserWarning")  # higher, of its own rules
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_optimizer_of_higher(optimizer: Callable[..., Any]) -> None:
    options = {"copy_initial_weights": False}
    assert_same(*both(mlp, lambda net: optimizer(net.parameters()), **options))


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:Differentiable R:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_has_stepped_already_is_gone_on_from(optimizer: Any) -> None:
    def stepped(net: nn.Module) -> torch.optim.Optimizer:
        opt = optimizer(net.parameters())
        for seed in (5, 6):
            opt.zero_grad()
            loss_of(net(batch(seed))).backward()
            opt.step()
        return opt

    assert_same(*both(mlp, stepped, copy_initial_weights=False))


def two_groups(net: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    return SGD([{"params": biases, "lr": 0.2}, {"params": weights}], lr=0.1, momentum=0.5)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


OVERRIDES = {
    "one for all groups": lambda: {"lr": [leaf(0.15)], "momentum": [leaf(0.3)]},
    "one a group": lambda: {"lr": [leaf(0.15), leaf(0.05)], "weight_decay": [0.1, leaf(0.2)]},
    "a tensor of values": lambda: {"lr": torch.tensor([0.1, 0.2], dtype=F64, requires_grad=True)},
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
def test_param_groups_and_overrides(override: Callable[[], dict]) -> None:
    ours, theirs = both(mlp, two_groups, copy_initial_weights=False, override=override)
    assert_same(ours, theirs)
    assert all(g is not None and g.abs().sum() > 0 for g in ours["gradients"][4:])


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "connected"])
def test_without_tracking(copy: bool) -> None:
    options = {"copy_initial_weights": copy, "track_higher_grads": False}
    assert_same(*both(ConvNet, lambda net: SGD(net.parameters(), lr=0.1, momentum=0.5), **options))


def clip(grads: list[Tensor]) -> list[Tensor]:
    norm = torch.stack([g.pow(2).sum() for g in grads]).sum().sqrt()
    return [g / norm for g in grads]


@pytest.mark.parametrize(
    "callback", [clip, lambda gs: [g.detach() for g in gs]], ids=["clip", "first order"]
)
def test_gradient_callbacks(callback: Callable[[list], list]) -> None:
    options = {"copy_initial_weights": False, "callback": callback}
    assert_same(*both(mlp, two_groups, **options))


def functional_loop(api: ModuleType, model: nn.Module) -> list[Tensor]:
    """Explicit parameters, without `innerloop_ctx`."""
    fmodel = api.patch.make_functional(model)
    params = api.utils.get_func_params(model)
    diffopt = api.optim.get_diff_optim(SGD(model.parameters(), lr=0.1), model.parameters())
    start = params
    for step in range(3):
        loss = loss_of(fmodel(batch(step), params=params))
        params = diffopt.step(loss, params=params)
    outer = loss_of(fmodel(batch(9), params=params))
    return [*params, outer, *torch.autograd.grad(outer, start)]


def created_loop(api: ModuleType, model: nn.Module) -> list[Tensor]:
    fmodel = api.monkeypatch(model, copy_initial_weights=True)
    diffopt = api.create_diff_optim(torch.optim.Adagrad, {"lr": 0.2}, fmodel=fmodel)
    for step in range(3):
        loss = loss_of(fmodel(batch(step), params=fmodel.parameters()))
        diffopt.step(loss, params=fmodel.parameters(time=-1))
    outer = loss_of(fmodel(batch(9)))
    times = [p for t in range(7) for p in fmodel.parameters(time=t)]
    return [*times, outer, *torch.autograd.grad(outer, fmodel.init_fast_params)]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("loop", [functional_loop, created_loop])
def test_loops_with_explicit_parameters(loop: Callable[..., list[Tensor]]) -> None:
    ours, theirs = (loop(api, make(mlp)) for api in (metarun.higher, higher))
    assert len(ours) == len(theirs) > 8
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_every_name_of_higher_is_there() -> None:
    assert {n for n in dir(higher) if not n.startswith("_")} <= set(dir(metarun.higher))
    for part in ("optim", "patch", "utils"):
        ours = set(dir(getattr(metarun.higher, part)))
        assert {n for n in dir(getattr(higher, part)) if not n.startswith("_")} <= ours
