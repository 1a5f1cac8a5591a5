"""Patched modules: whatever a model does with its parameters, it does with the fast weights."""

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import metarun.higher as higher
from metarun.higher.patch import buffer_sync, make_functional, monkeypatch
from metarun.unroll import RightDerivatives

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Other weights for a model, by name; the frozen ones stay."""
    return {
        name: p + 0.1 * randn(*p.shape, seed=i) if p.requires_grad else p.detach()
        for i, (name, p) in enumerate(model.named_parameters())
    }


class Attention(nn.Module):
    """Reads its submodules' weights itself (`out_proj`), and uses fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 2, 4)
        return self.mha(x, x, x, need_weights=False)[0].flatten(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(self.a(x)).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(4, 3, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.view(len(x), 2, 4))[0].flatten(1)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)
        self.a.register_forward_hook(lambda module, args, out: out * module.weight.sum())
        self.b.register_forward_pre_hook(self.shift)

    def shift(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + self.a.bias,)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Listed(nn.Module):
    """Parameters and modules in containers, registered and plain, and bound methods."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(8))})
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.plain = {"first": [self.layers[0], self.weights[1]]}
        self.last = functools.partial(self.act, slope=0.3)

    def act(self, x: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x, slope) + self.named["bias"]

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.plain["first"]
        return self.last(self.layers[1](layer(x) @ self.weights[0]) @ weight)


def parametrized(parametrize: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(parametrize(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    return model


def with_conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
    "conv and batch norm": with_conv,
    "attention": Attention,
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    ),
    "tied": Tied,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "hooks": Hooked,
    "weight norm": lambda: parametrized(nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: parametrized(nn.utils.parametrizations.spectral_norm).eval(),
    "orthogonal": lambda: parametrized(nn.utils.parametrizations.orthogonal),
    "frozen": frozen,
}


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_patched_model_computes_with_its_fast_weights_and_twice_differentiably(build) -> None:
    """The oracle calls the model itself, with the same weights, by `functional_call`."""
    model, x = make(build), randn(6, 8)
    before = copy.deepcopy(model.state_dict())
    weights = moved(model)
    leaves = [w for w in weights.values() if w.requires_grad]
    fmodel = monkeypatch(model)
    assert isinstance(fmodel, type(model)) and "Functional" in repr(fmodel)
    fmodel.update_params(list(weights.values()))

    def second_order(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = call(x).sin().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        outer = sum(g.pow(2).sum() for g in grads)
        return [loss, *grads, *torch.autograd.grad(outer, leaves)]

    found = second_order(fmodel)
    assert_same(model.state_dict(), before)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), RightDerivatives(2):
        expected = second_order(lambda inputs: functional_call(model, weights, (inputs,)))
    assert_same(found, expected)
    assert all(grad.abs().sum() > 0 for grad in found[1 : 1 + len(leaves)])


def test_parameters_in_plain_containers_and_bound_methods() -> None:
    model, x = make(Listed), randn(5, 8)
    weights = moved(model)
    fmodel = monkeypatch(model)
    fmodel.update_params(weights.values())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p, weight in zip(other.parameters(), weights.values(), strict=True):
            p.copy_(weight)
    assert_same(fmodel(x), other(x))
    assert fmodel.plain["first"][1] is fmodel.weights[1] is not model.weights[1]


def test_parameters_in_a_tuple_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.pair = (model.weight, model.bias)
    with pytest.raises(ValueError, match="keeps parameters in a tuple"):
        monkeypatch(model)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_of_old() -> None:
    """It sets the module's weight, a tensor in a graph, in a forward hook."""
    model, x = nn.utils.weight_norm(make(lambda: nn.Linear(8, 3))), randn(4, 8)
    model(x)
    fmodel = monkeypatch(model, copy_initial_weights=False)
    bias, g, v = (p * 1.5 for p in fmodel.fast_params)
    found = fmodel(x, params=[bias, g, v])
    assert_same(found, F.linear(x, torch._weight_norm(v, g), bias))
    (gradient,) = torch.autograd.grad(found.sum(), model.weight_g)
    assert gradient.abs().sum() > 0


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


def test_submodules_methods_and_attributes_show_the_current_fast_weights() -> None:
    model, x = make(Encoder), randn(5, 8)
    fmodel = monkeypatch(model)
    start = fmodel.fast_params
    params = [p * 2 for p in start]
    fmodel.update_params(params)
    w1, b1, w2, b2 = params
    hidden = F.linear(x, w1, b1).tanh()
    assert_same(fmodel.encode(x), hidden)
    assert_same(fmodel.body(x), hidden)
    assert_same(fmodel.body[:1](x).tanh(), hidden)
    assert_same(fmodel.head(hidden), F.linear(hidden, w2, b2))
    assert_same(fmodel.head.forward(hidden), F.linear(hidden, w2, b2))
    assert fmodel.head.weight is w2
    assert list(fmodel.head.parameters()) == [w2, b2]
    assert [name for name, _ in fmodel.named_parameters()] == names_of(model)
    assert dict(fmodel.named_parameters())["head.bias"] is b2
    assert_same(fmodel.state_dict()["head.weight"], w2)
    assert list(fmodel.parameters(recurse=False)) == []
    # a submodule takes the whole model's parameters, as the model does
    assert_same(fmodel.body(x, params=start), F.linear(x, start[0], start[1]).tanh())
    assert_same(fmodel.forward(x, params=params), F.linear(hidden, w2, b2))


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_a_sequential_root_can_be_called_in_parts() -> None:
    """Its length is 0 while it is being copied."""
    model, x = make(MODELS["sequential"]), randn(5, 8)
    fmodel = monkeypatch(model)
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    weight, bias = fmodel.fast_params[:2]
    assert_same(fmodel[0](x), F.linear(x, weight, bias))
    assert_same(fmodel[2](fmodel[1](fmodel[0](x))), fmodel(x))


def test_the_history() -> None:
    fmodel = monkeypatch(make(Encoder), copy_initial_weights=True)
    start = list(fmodel.parameters(time=0))
    assert all(p.is_leaf and p.requires_grad for p in start)
    fmodel.update_params([p + 1 for p in start])
    fmodel.fast_params = [p + 2 for p in start]
    fmodel(randn(1, 8), params=[p + 3 for p in start])
    fmodel.head.bias = start[3] + 4
    assert_same(
        [next(fmodel.parameters(time=t)) - start[0] for t in range(5)],
        list(torch.ones_like(start[0]) * k for k in (0, 1, 2, 3, 3)),
    )
    assert all(a is b for a, b in zip(fmodel.parameters(time=0), start, strict=True))
    assert all(a is b for a, b in zip(fmodel.init_fast_params, start, strict=True))
    assert all(a is b for a, b in zip(fmodel.parameters(), fmodel.fast_params, strict=True))
    assert_same(fmodel.head.bias, start[3] + 4)
    with pytest.raises(ValueError, match="time=5: there were 4 updates"):
        fmodel.parameters(time=5)
    with pytest.raises(TypeError, match="must be a tensor"):
        fmodel.head.bias = 0.0


def test_without_tracking_only_the_latest_weights_are_kept() -> None:
    model = make(Encoder)
    fmodel = monkeypatch(model, track_higher_grads=False)
    diffopt = higher.get_diff_optim(
        torch.optim.Adam(model.parameters(), weight_decay=0.1),
        model.parameters(),
        fmodel=fmodel,
        track_higher_grads=False,
    )
    gone, second_order = [], []

    def look(grads: list[Tensor]) -> list[Tensor]:
        second_order.extend(g.requires_grad for g in grads)
        return grads

    for _ in range(3):
        gone += [weakref.ref(p) for p in fmodel.parameters()]
        diffopt.step(fmodel(randn(5, 8)).pow(2).sum(), grad_callback=look)
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
    assert all(reference() is None for reference in gone)
    assert len(second_order) == 12 and not any(second_order)
    assert fmodel.track_higher_grads is False
    with pytest.raises(ValueError, match="only the latest"):
        fmodel.parameters(time=1)
    with pytest.raises(ValueError, match="only kept with track_higher_grads=True"):
        _ = fmodel.init_fast_params
    with pytest.raises(ValueError, match="True or False"):
        fmodel.track_higher_grads = 1


@pytest.mark.parametrize("track", [True, False])
def test_an_inner_loop_leaves_nothing_behind(track: bool) -> None:
    """Not even until the garbage collector runs: graphs are large."""
    model = make(with_conv)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gc.collect()
    gc.disable()
    try:
        context = higher.innerloop_ctx(
            model, optimizer, copy_initial_weights=False, track_higher_grads=track
        )
        with context as (fmodel, diffopt):
            diffopt.step(fmodel(randn(6, 8)).pow(2).sum())
            kept = [weakref.ref(x) for x in (fmodel, diffopt, *fmodel.parameters())]
        del fmodel, diffopt, context
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


def test_buffers_are_the_patched_models_own_until_they_are_synced() -> None:
    model, x = make(with_conv), randn(6, 8)
    fmodel = monkeypatch(model)
    for seed in range(3):
        fmodel(randn(6, 8, seed=seed))
    statistics = fmodel[2].running_mean
    assert statistics.abs().sum() > 0 and model[2].running_mean.abs().sum() == 0
    assert fmodel[2].num_batches_tracked == 3 and model[2].num_batches_tracked == 0
    fmodel.eval()
    expected = copy.deepcopy(model)
    expected[2].running_mean.copy_(fmodel[2].running_mean)
    expected[2].running_var.copy_(fmodel[2].running_var)
    assert_same(fmodel(x), expected.eval()(x))
    assert model.training, "the model's own mode changed"

    buffer_sync(fmodel, model)  # back to the model
    assert_same(model[2].running_mean, statistics)
    assert model[2].running_mean is not statistics
    model[2].running_mean.zero_()
    buffer_sync(model, fmodel)
    assert fmodel[2].running_mean.abs().sum() == 0
    with pytest.raises(KeyError, match="no submodule '0'"):
        buffer_sync(model, model[0])


class Counted(nn.Module):
    """A buffer changed in place, and a submodule with a `params` argument of its own."""

    class Scale(nn.Module):
        def forward(self, x: Tensor, params: float) -> Tensor:
            return x * params

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 2), Counted.Scale()
        self.register_buffer("calls", torch.zeros((), dtype=F64))
        self.also = [self.calls]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale(self.linear(x), params=float(self.also[0]))


def test_buffers_changed_in_place_and_an_argument_called_params() -> None:
    model, x = make(Counted), randn(5, 8)
    fmodel = monkeypatch(model)
    first = fmodel(x, params=[p * 2 for p in fmodel.parameters()])
    assert_same(first, 2 * model.linear(x))
    assert_same(fmodel(x), 2 * first)
    assert fmodel.calls == 2 and model.calls == 0
    assert len(list(fmodel.parameters(time=1))) == 2


def test_batch_norm_in_evaluation_and_then_in_training_mode() -> None:
    """The statistics that a graph was built with must outlive their update in place."""
    fmodel = monkeypatch(make(with_conv)).eval()
    loss = fmodel(randn(6, 8)).pow(2).sum()
    before = torch.autograd.grad(loss, fmodel.fast_params, retain_graph=True)
    fmodel.train()(5 * randn(6, 8, seed=1) + 3)
    assert_same(torch.autograd.grad(loss, fmodel.fast_params), before)


def test_deepcopy_is_a_fork_with_the_same_past() -> None:
    model, x = make(Tied), randn(5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(fmodel(x).pow(2).mean())
        fork = copy.deepcopy({"model": fmodel})["model"]
        assert_same(fork(x), fmodel(x))
        there = [p.clone() for p in fmodel.parameters()]
        fork.update_params([2 * p for p in fork.parameters()])
        assert_same(list(fmodel.parameters()), there)
        assert fork.a.weight is fork.b.weight is fork.again.weight is not fmodel.a.weight
        assert [next(m.parameters(time=0)) is fmodel.init_fast_params[0] for m in (fork, fmodel)]
        gradients = torch.autograd.grad(fork(x).sum(), list(model.parameters()))
        assert all(g.abs().sum() > 0 for g in gradients)


def test_deepcopy_of_a_recurrent_model() -> None:
    fmodel, x = monkeypatch(make(lambda: Recurrent(nn.LSTM))), randn(5, 8)
    fmodel(x)
    fork = copy.deepcopy(fmodel)
    params = [0.5 * p for p in fork.parameters()]
    assert_same(fork(x, params=params), fmodel(x, params=params))
    fmodel.update_params([2 * p for p in params])
    assert_same(fork(x), fork(x, params=params))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_checkpoints_in_the_model_are_refused(reentrant: bool, track: bool) -> None:
    """Their recomputation would see the fast weights of a later step."""

    class Checkpointed(Encoder):
        def encode(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant)

    model, x = make(Checkpointed), randn(5, 8).requires_grad_()
    fmodel = monkeypatch(model, track_higher_grads=track)
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint"):
        fmodel(x)
    with torch.no_grad():
        fmodel(x)  # without a backward pass there is nothing to recompute
    model(x).sum().backward()  # elsewhere it goes on working
    assert x.grad is not None and model.body[0].weight.grad is not None


def test_checkpoints_in_other_threads_go_on_meanwhile() -> None:
    class Threaded(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            def other() -> None:
                for reentrant in (True, False):
                    checkpoint(elsewhere, x, use_reentrant=reentrant).sum().backward()

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return super().forward(x)

    elsewhere = make(lambda: nn.Linear(8, 2))
    monkeypatch(make(Threaded))(randn(5, 8).requires_grad_())
    assert_same(elsewhere.bias.grad, torch.full((2,), 10.0, dtype=F64))


@pytest.mark.parametrize("frozen", [False, True])
def test_recurrent_networks_run_without_cudnn(frozen: bool, request: pytest.FixtureRequest) -> None:
    """cuDNN's have no second derivative. torch's own test tools freeze its flags for good."""
    flags = torch.backends.flags_frozen.__globals__
    name = "__allow_nonbracketed_mutation_flag"
    request.addfinalizer(partial(flags.__setitem__, name, flags[name]))
    flags[name] = not frozen
    seen = []

    class Probe(nn.GRU):
        def forward(self, *args: Any) -> Any:
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(*args)

    monkeypatch(make(lambda: Recurrent(Probe)))(randn(5, 8))
    assert seen == [False] and torch.backends.cudnn.enabled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lstm", "gru", "attention", "conv and batch norm"])
def test_an_inner_loop_on_a_gpu_is_that_of_the_cpu(name: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model, x = make(MODELS[name]), randn(6, 8).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-2)
        with higher.innerloop_ctx(model, optimizer, device=device) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(fmodel(x).sin().sum())
            outer = fmodel(x).pow(2).sum()
            grads = torch.autograd.grad(outer, list(fmodel.parameters(time=0)))
        assert {str(p.device.type) for p in fmodel.parameters()} == {device}
        results.append([grad.cpu() for grad in grads])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_a_functional_model_has_no_weights_until_it_is_given_some() -> None:
    model, x = make(Encoder), randn(5, 8)
    given = []
    fmodel = make_functional(model, encapsulator=lambda f, m: given.append((f, m)))
    assert given == [(fmodel, model)] and fmodel.fast_params is None
    for call in (lambda: fmodel(x), lambda: fmodel.encode(x), lambda: fmodel.parameters()):
        with pytest.raises(ValueError, match="no fast weights"):
            call()
    params = higher.utils.get_func_params(model)
    assert_same(fmodel(x, params=params), model(x))
    assert fmodel.fast_params == params
    with pytest.raises(ValueError, match="has 4 parameters, not 3"):
        fmodel(x, params=params[:3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_patched_or_compiled_already_is_refused() -> None:
    fmodel = monkeypatch(make(Encoder))
    with pytest.raises(ValueError, match="patched already"):
        monkeypatch(nn.Sequential(fmodel))
    with pytest.raises(ValueError, match=r"torch\.compile"):
        monkeypatch(torch.compile(make(Encoder)))
    with pytest.raises(ValueError, match=r"weight cannot be exchanged"):
        monkeypatch(torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_in_place_is_patched_uncompiled() -> None:
    model, x = make(Encoder), randn(5, 8)
    model.compile(backend="eager")
    fmodel = monkeypatch(model)
    assert_same(
        fmodel(x, params=[0 * p for p in fmodel.parameters()]), torch.zeros(5, 2, dtype=F64)
    )


def test_utils() -> None:
    assert higher.utils.flatten([1, {"a": (2, [3])}, {4}]) == [1, 2, 3, 4]
    model = frozen()
    params = higher.utils.get_func_params(model)
    assert [p.requires_grad for p in params] == [False, False, True, True]
    assert all(
        p.is_leaf and p.data_ptr() != q.data_ptr()
        for p, q in zip(params, model.parameters(), strict=True)
    )
    shared = higher.utils.get_func_params(model, safe_copy=False)
    assert all(
        p.data_ptr() == q.data_ptr() for p, q in zip(shared, model.parameters(), strict=True)
    )
