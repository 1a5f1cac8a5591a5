"""A patched model never computes with weights that its steps do not adapt, without a word."""

import collections
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import metarun.higher as higher
from metarun.higher.patch import make_functional, monkeypatch

F64 = torch.float64
X = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """What all models below compute, written with submodules."""

    def __init__(self, reach: Callable[["Plain"], Any] | None = None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        if reach is not None:
            self.reached = reach(self)

    def embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = vars(self).get("reached", self.body)(x)
        return embedded

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.embed(x).tanh())
        return scores


class Helper:
    """An object that is no module."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, x: Tensor) -> Any:
        return self.held(x)


class Unregistered(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def build(reach: Callable[[Plain], Any] | None = None) -> Plain:
    torch.manual_seed(0)
    return Plain(reach).double()


def meta_gradient(net: nn.Module, track: bool = True) -> list[Tensor]:
    """The outer loss after two steps, the fast weights, and what of the rest can be had."""
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, track_higher_grads=track) as (
        fnet,
        diffopt,
    ):
        for _ in range(2):
            diffopt.step(fnet(X).pow(2).sum())
        loss = fnet(X).sin().sum()
    sources = list(net.parameters()) if track else fnet.fast_params
    return [loss, *fnet.fast_params, *torch.autograd.grad(loss, sources)]


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def by_recursion(net: Plain) -> Callable[..., Any]:
    def walk(x: Tensor, depth: int = 2) -> Any:
        return net.body(x) if depth == 0 else walk(x, depth - 1)

    return walk


def by_wrapper(net: Plain) -> Callable[..., Any]:
    method = net.body.forward

    @functools.wraps(method)
    def wrapped(*args: Any) -> Any:
        return method(*args)

    return wrapped


def by_shared_cell(net: Plain) -> Callable[..., Any]:
    """Two functions, one variable, and a count that both of them raise."""
    body, calls = net.body, 0

    def inner(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return body(x)

    return lambda x: inner(x) if body is not None else calls


def in_list(value: Any) -> list[Any]:
    return [value]


FOLLOWED: dict[str, Callable[[Plain], Any]] = {
    "a lambda over self": lambda net: lambda x: net.body(x),
    "a lambda over a submodule": lambda net: (lambda body: lambda x: body(x))(net.body),
    "a default": lambda net: lambda x, body=net.body: body(x),
    "a keyword default": lambda net: lambda x, *, body=net.body: body(x),
    "a partial": lambda net: functools.partial(lambda body, x: body(x), net.body),
    "parameters in a partial": lambda net: functools.partial(
        F.linear, weight=net.body.weight, bias=net.body.bias
    ),
    "a bound method": lambda net: net.body.forward,
    "a list in a closure": lambda net: (lambda held: lambda x: held[0](x))([net.body]),
    "a list of parameters": lambda net: (lambda held: lambda x: F.linear(x, *held))(
        [net.body.weight, net.body.bias]
    ),
    "a dict of parameters": lambda net: (lambda held: lambda x: F.linear(x, **held))(
        dict(net.body.named_parameters())
    ),
    "a weak reference": lambda net: (lambda ref: lambda x: ref()(x))(weakref.ref(net.body)),
    "a function that calls itself": by_recursion,
    "a wrapped function": by_wrapper,
    "a variable of two functions": by_shared_cell,
}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("reach", FOLLOWED.values(), ids=FOLLOWED)
def test_what_reaches_a_submodule_adapts_it(reach: Callable[[Plain], Any], track: bool) -> None:
    assert_same(meta_gradient(build(reach), track), meta_gradient(build(), track))


def test_the_meta_gradient_through_a_closure_is_that_of_finite_differences() -> None:
    net = build(FOLLOWED["a lambda over self"])
    weight, (gradient, *_) = net.body.weight, meta_gradient(net)[5:]
    along = torch.randn_like(weight)
    outer = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(h * along)
            start = weight.detach().clone()
        outer.append(meta_gradient(net)[0])
        with torch.no_grad():
            weight.copy_(start - h * along)
    expected = (outer[0] - outer[1]) / 2e-6
    torch.testing.assert_close((gradient * along).sum(), expected, rtol=1e-7, atol=0)


def by_global(net: Plain) -> Callable[..., Any]:
    globals()["_held"] = net.body
    return lambda x: _held(x)  # noqa: F821


def by_tensor(net: Plain) -> Callable[..., Any]:
    weight, bias = net.body.weight, net.body.bias
    return lambda x: F.linear(x, weight, bias)


def by_data(net: Plain) -> Callable[..., Any]:
    held = Helper(net.body)
    return lambda x: x @ held.held.weight.data.T


NOT_FOLLOWED: dict[str, Callable[[Plain], Any]] = {
    "a helper object": lambda net: Helper(net.body),
    "a method of a helper object": lambda net: Helper(net.body).__call__,
    "a helper object in a closure": lambda net: (lambda h: lambda x: h(x))(Helper(net.body)),
    "parameters in a helper object": lambda net: (lambda h: lambda x: F.linear(x, *h.held))(
        Helper([net.body.weight, net.body.bias])
    ),
    "a module in a list that is no ModuleList": lambda net: (lambda m: lambda x: m[0](x))(
        [Unregistered(net.body)]
    ),
    "a module of another model": lambda net: Helper(nn.Sequential(net.body)),
    "a namedtuple": lambda net: (lambda t: lambda x: t.body(x))(
        collections.namedtuple("Held", "body")(net.body)
    ),
    "a defaultdict": lambda net: (lambda d: lambda x: d["body"](x))(
        collections.defaultdict(list, body=net.body)
    ),
    "a weak proxy": lambda net: (lambda p: lambda x: p(x))(weakref.proxy(net.body)),
    "a cache": lambda net: functools.lru_cache(lambda x: net.body(x)),
    "a global variable": by_global,
    "the tensor itself": by_tensor,
    "the tensor's data": by_data,
    "its number": lambda net: (lambda h: lambda x: x * h.held.bias[0].item())(Helper(net.body)),
}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("reach", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_what_cannot_be_followed_is_refused_by_the_parameters_name(reach, track, copy) -> None:
    net = build(reach)
    fnet = monkeypatch(net, copy_initial_weights=copy, track_higher_grads=track)
    for call in (fnet, fnet.forward, fnet.embed):
        with pytest.raises(RuntimeError, match=r"'body\.(weight|bias)' of the original model was"):
            call(X)
    assert all(type(p) is nn.Parameter for p in net.parameters())
    net(X).sum().backward()  # the model itself goes on working
    if "data" not in reach.__name__ and net.body.weight.grad is not None:
        assert net.body.weight.grad.abs().sum() > 0


class Aliased(nn.Module):
    """Keeps another name for the numbers of a weight."""

    def __init__(self, alias: Callable[["Aliased"], Any]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.alias = alias(self)

    def forward(self, x: Tensor) -> Tensor:
        held = self.alias
        weight = held() if callable(held) else held["body.weight"] if type(held) is dict else held
        hidden = F.linear(x, weight.view(3, 3), self.body.bias)
        scores: Tensor = self.head(hidden)
        return scores


def of_cell(model: Aliased) -> Callable[[], Tensor]:
    weight = model.body.weight.detach()
    return lambda: weight


ALIASES: dict[str, Callable[[Aliased], Any]] = {
    "view": lambda m: m.body.weight.view(-1),
    "data": lambda m: m.body.weight.data,
    "detached": lambda m: m.body.weight.detach(),
    "state dict": lambda m: dict(m.state_dict()),
    "transposed": lambda m: m.body.weight.T,
    "closure": of_cell,
    "buffer": lambda m: nn.Buffer(m.body.weight.data),
}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_another_name_for_the_numbers_of_a_weight_is_recognised(alias: Any, track: bool) -> None:
    """In plain torch it follows the weight; of a copy it would stay where the original is."""
    model = Aliased(alias).double()
    model.alias = alias(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        higher.innerloop_ctx(model, optimizer, track_higher_grads=track) as (fnet, _),
        pytest.raises(RuntimeError, match=r"'body\.weight' of the original .*view, \.data or a st"),
    ):
        fnet(X)


def test_an_alias_that_is_not_used_or_of_a_frozen_weight_is_none_of_our_business() -> None:
    model = build()
    model.kept = model.body.weight.data
    frozen = Aliased(lambda m: m.body.weight.requires_grad_(False).view(-1)).double()
    frozen.alias = frozen.body.weight.view(-1)
    for one in (model, frozen):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1)
        with higher.innerloop_ctx(one, optimizer) as (fnet, diffopt):
            diffopt.step(fnet(X).pow(2).mean())
            assert fnet(X).isfinite().all()


def test_a_parameter_among_the_defaults_of_a_function_is_refused() -> None:
    net = build(lambda net: lambda x, weight=net.body.weight: x @ weight.T)
    with pytest.raises(ValueError, match=r"in a tuple \(or .*\): 'body\.weight'"):
        monkeypatch(net)


def test_hooks_that_close_over_a_module_are_the_copys() -> None:
    def hooked(net: Plain) -> Plain:
        net.head.register_forward_pre_hook(lambda module, args: (args[0] + net.body(args[0]),))
        return net

    class Written(Plain):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x).tanh()
            scores: Tensor = self.head(hidden + self.body(hidden))
            return scores

    found = meta_gradient(hooked(build()))
    torch.manual_seed(0)
    assert_same(found, meta_gradient(Written().double()))


def test_hooks_that_close_over_other_things_keep_them() -> None:
    net, seen = build(), []
    net.body.register_forward_hook(lambda module, args, out: seen.append(out))
    monkeypatch(net)(X)
    assert len(seen) == 1


def test_what_is_frozen_may_be_reached_anyhow() -> None:
    def reach(net: Plain) -> Any:
        net.body.requires_grad_(False)
        return Helper(net.body)

    net = build(reach)
    opt = torch.optim.SGD(net.head.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(fnet(X).pow(2).sum())
        assert_same(fnet(X), fnet.head(net.body(X).tanh()))
        fnet.body.weight = 2 * fnet.body.weight
        with pytest.raises(RuntimeError, match=r"'body\.weight' of the original"):
            fnet(X)


def test_buffers_of_the_original_are_read_but_not_written() -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False)
            self.helper = Helper(self.norm)

        def embed(self, x: Tensor) -> Tensor:
            embedded: Tensor = self.helper(self.body(x))
            return embedded

    net = Normed().double()
    with pytest.raises(RuntimeError, match=r"'norm\.\w+' of the original model"):
        monkeypatch(net)(X)
    assert net.norm.running_mean.abs().sum() == 0 and net.norm.num_batches_tracked == 0
    fnet = monkeypatch(net.eval())
    assert_same(fnet(X), net(X))
    fnet.norm.running_mean.add_(1)
    with pytest.raises(RuntimeError, match=r"'norm\.running_mean' of the original model"):
        fnet(X)


def test_what_depends_on_no_values_and_what_the_caller_hands_in_is_allowed() -> None:
    class Anchored(Plain):
        def embed(self, x: Tensor) -> Tensor:
            somewhere = _net.body.weight
            assert somewhere.shape == (3, 3) and somewhere.dim() == 2
            embedded: Tensor = self.body(x.to(somewhere.device, somewhere.dtype))
            return embedded + torch.zeros_like(_net.body.bias)

        def distance(self, others: list[Tensor]) -> Tensor:
            pairs = zip(self.parameters(), others, strict=True)
            return torch.stack([(p - q).pow(2).sum() for p, q in pairs]).sum()

    _net = Anchored().double()
    other = Anchored().double()
    fnet = monkeypatch(other, copy_initial_weights=False)
    fnet.update_params([p + 1 for p in fnet.parameters()])
    assert_same(fnet.distance(list(other.parameters())), torch.tensor(20.0, dtype=F64))
    (fnet(X) + F.linear(X, other.body.weight)[:, :2]).sum().backward()  # between calls, too
    assert other.body.weight.grad is not None
    functional = make_functional(other)
    assert_same(functional(X, params=other.parameters()), other(X))


def test_threads_may_use_the_original_meanwhile() -> None:
    class Threaded(Plain):
        def embed(self, x: Tensor) -> Tensor:
            if self is not net:
                thread = threading.Thread(target=lambda: found.append(net(x)))
                thread.start()
                thread.join()
            embedded: Tensor = self.body(x)
            return embedded

    net, found = Threaded().double(), []
    fnet = monkeypatch(net)
    fnet.update_params([2 * p for p in fnet.parameters()])
    fnet(X)
    assert_same(found[0], net(X))
    assert type(found[0]) is Tensor and type(net.body.weight) is nn.Parameter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.head = nn.Linear(3, 2, bias=False)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.scales = nn.ParameterList([torch.ones(2)])
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(x) + self.shift)
        for layer in self.layers:
            x = layer(x)
        return x * self.scales[0]


def two(*shape: int) -> Tensor:
    return torch.full(shape, 2.0, dtype=F64, requires_grad=True)


def new() -> nn.Module:
    return nn.Linear(2, 2).double()


REFUSED_CHANGES: dict[str, Callable[[Any], Any]] = {
    "an item": lambda fnet: fnet.body.__setitem__(0, nn.Linear(3, 3).double()),
    "an attribute": lambda fnet: setattr(fnet, "body", nn.Linear(3, 3).double()),
    "the original's": lambda fnet: setattr(fnet, "head", nn.Linear(3, 2).double()),
    "add_module": lambda fnet: fnet.add_module("more", new()),
    "register_parameter": lambda fnet: fnet.register_parameter("more", nn.Parameter(two(2))),
    "a new parameter": lambda fnet: setattr(fnet, "more", nn.Parameter(two(2))),
    "a bias": lambda fnet: setattr(fnet.head, "bias", nn.Parameter(two(2))),
    "a bias, unseen": lambda fnet: fnet.head._parameters.update(bias=nn.Parameter(two(2))),
    "append": lambda fnet: fnet.layers.append(new()),
    "insert": lambda fnet: fnet.layers.insert(0, new()),
    "an item of a ModuleList": lambda fnet: fnet.layers.__setitem__(0, new()),
    "a longer ParameterList": lambda fnet: fnet.scales.append(two(2)),
    "_modules": lambda fnet: fnet._modules.update(head=nn.Linear(3, 2).double()),
    "_parameters": lambda fnet: fnet.head._parameters.update(weight=two(2, 3)),
    "the list of fast weights": lambda fnet: fnet.fast_params.__setitem__(0, two(3, 3)),
    "a deleted parameter": lambda fnet: delattr(fnet.head, "weight"),
    "a parametrization": lambda fnet: parametrizations.weight_norm(fnet.head),
    "a constant": lambda fnet: setattr(fnet.head, "weight", torch.ones(2, 3, dtype=F64)),
    "nothing": lambda fnet: setattr(fnet.head, "weight", None),
}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("change", REFUSED_CHANGES.values(), ids=REFUSED_CHANGES)
def test_changes_that_no_step_would_adapt_raise_at_the_next_use(change, track: bool) -> None:
    net = Net().double()
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    message = "new parameter|was taken out|must be a tensor|does not require gradients"
    for steps in (False, True):
        with higher.innerloop_ctx(net, opt, track_higher_grads=track) as (fnet, diffopt):
            diffopt.step(fnet(X).pow(2).sum())
            loss = fnet(X).pow(2).sum()
            with pytest.raises((ValueError, TypeError), match=message):
                change(fnet)
                diffopt.step(loss) if steps else fnet(X)


ADAPTED_CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parameter": lambda fnet: setattr(fnet.head, "weight", nn.Parameter(two(2, 3))),
    "a tensor": lambda fnet: setattr(fnet.head, "weight", two(2, 3) * 1),
    "update_params": lambda fnet: fnet.update_params([2 * p for p in fnet.parameters()]),
    "another activation": lambda fnet: fnet.body.__setitem__(1, nn.ReLU()),
    "a second name": lambda fnet: setattr(fnet, "again", fnet.head),
    "around a submodule": lambda fnet: setattr(fnet, "head", nn.Sequential(fnet.head, nn.Tanh())),
    "a buffer": lambda fnet: fnet.register_buffer("shift", 2 * X[0]),
    "a hook": lambda fnet: fnet.head.register_forward_hook(lambda m, args, out: 2 * out),
    "load_state_dict": lambda fnet: fnet.load_state_dict(
        {name: 0.5 * value for name, value in fnet.state_dict().items()}
    ),
    "data": lambda fnet: [p.data.add_(0.1) for p in fnet.parameters()],
    "a type": lambda fnet: fnet.float().double(),
}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("change", ADAPTED_CHANGES.values(), ids=ADAPTED_CHANGES)
def test_other_changes_take_effect_and_are_adapted(change, track: bool) -> None:
    torch.manual_seed(0)
    net = Net().double()
    start = [p.detach().clone() for p in net.parameters()]
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    with higher.innerloop_ctx(net, opt, track_higher_grads=track) as (fnet, diffopt):
        diffopt.step(fnet(X).pow(2).sum())
        unchanged = fnet(X).detach()
        change(fnet)
        before, output = list(fnet.fast_params), fnet(X)
        if change is not ADAPTED_CHANGES["a second name"]:
            assert (output - unchanged).abs().max() > 1e-9
        grads = torch.autograd.grad(output.pow(2).sum(), before, retain_graph=True)
        diffopt.step(output.pow(2).sum())
    for p, was, grad in zip(fnet.fast_params, before, grads, strict=True):
        assert grad.abs().sum() > 0
        assert_same(p, was - 0.05 * grad)
    assert_same(list(net.parameters()), start)


def test_a_meta_gradient_goes_through_a_change_of_type() -> None:
    net = build()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    grads = []
    for cast in (False, True):
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fnet, diffopt):
            diffopt.step(fnet(X).pow(2).sum())
            if cast:
                fnet.body.float()
                assert fnet.head.weight.dtype == F64
                fnet.to(F64)
            grads.append(torch.autograd.grad(fnet(X).pow(2).sum(), list(net.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_loaded_values_depend_on_nothing_and_the_others_go_on() -> None:
    net = build()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fnet, diffopt):
        diffopt.step(fnet(X).pow(2).sum())
        (start, body) = fnet.init_fast_params[0].detach().clone(), fnet.body.weight
        fnet.head.load_state_dict({"weight": torch.ones(2, 3)}, strict=False)
        assert_same(fnet.head.weight, torch.ones(2, 3, dtype=F64))
        assert fnet.body.weight is body
        assert_same(fnet.init_fast_params[0], start)
        names = [name for name, _ in net.named_parameters()]
        found = torch.autograd.grad(
            fnet.head.weight.sum(), list(net.parameters()), allow_unused=True
        )
        assert dict(zip(names, found, strict=True)) == dict.fromkeys(names)
        with pytest.raises(RuntimeError, match="Missing key"):
            fnet.load_state_dict({})


@pytest.mark.parametrize("copy", [True, False])
def test_writing_on_a_fast_weight_without_a_graph_is_refused_where_derivatives_go_on(copy) -> None:
    """A meta-gradient would pass through, as if the old value were still there."""
    net = build()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=copy) as (fnet, diffopt):
        if copy:  # leaves, of which nothing is known
            nn.init.ones_(fnet.head.weight)
        diffopt.step(fnet(X).pow(2).sum())
        fnet.body.bias.add_(1)  # has a graph
        fnet(X)
        fnet.apply(lambda module: isinstance(module, nn.Linear) and nn.init.zeros_(module.weight))
        with pytest.raises(ValueError, match=r"'body\.weight' was written in place under"):
            fnet(X)
    with higher.innerloop_ctx(net, opt, track_higher_grads=False) as (fnet, diffopt):
        diffopt.step(fnet(X).pow(2).sum())
        nn.init.zeros_(fnet.head.weight)
        assert_same(fnet(X), fnet.head.bias.expand(5, 2))


def test_initial_fast_weights_can_be_frozen_and_later_ones_say_how() -> None:
    net = build()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        fnet.body.requires_grad_(False)
        diffopt.step(fnet(X).pow(2).sum())
        assert_same(fnet.body.weight, net.body.weight.detach())
        assert (fnet.head.weight != net.head.weight).all()
        with pytest.raises(ValueError, match="grad_callback"):
            fnet.head.requires_grad_(False)


def test_the_original_is_not_reached_by_a_copy_without_fast_weights() -> None:
    net = build()
    fnet = make_functional(net)
    fnet.double().half()
    assert net.body.weight.dtype == F64
    with pytest.raises(ValueError, match="no fast weights"):
        fnet.load_state_dict(net.state_dict())
