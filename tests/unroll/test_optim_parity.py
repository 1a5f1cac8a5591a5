"""The functional optimizers take torch's steps, with every option of every optimizer."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from metarun.unroll import OPTIMIZERS, Params, muon, newton, partition, sgd, translate, unroll
from metarun.unroll.optim.from_torch import torch_state
from tests.unroll.optim_cases import (
    CASES,
    EVERY_CASE,
    IDS,
    assert_same,
    run,
    start,
    step_torch,
)

IGNORED = {"foreach", "fused", "capturable", "differentiable"}
"""Options that say how torch computes, not what."""

LR = 0.03


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """torch keeps some numbers in its default type (ASGD's eta, NAdam's product of momenta)."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("kind", "options"), EVERY_CASE, ids=IDS)
def test_twenty_steps_are_those_of_torch(kind: type[Optimizer], options: dict[str, Any]) -> None:
    theirs = {name: p.requires_grad_() for name, p in start(kind).items()}
    step_torch(kind(list(theirs.values()), lr=LR, **options), theirs, 20)
    ours, _ = run(translate(kind, {"lr": LR, **options}), start(kind), 20)
    assert_same(ours, theirs)
    assert all((ours[name] - p).abs().max() > 1e-3 for name, p in start(kind).items())


@pytest.mark.parametrize(("kind", "options"), EVERY_CASE, ids=IDS)
def test_so_is_the_state_after_each_step(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """All that torch keeps, used for the next step or not: ASGD's average never is."""
    theirs = {name: p.requires_grad_() for name, p in start(kind).items()}
    optimizer = kind(list(theirs.values()), lr=LR, **options)
    ours, params, state = translate(kind, {"lr": LR, **options}), start(kind), None
    for _ in range(7):
        step_torch(optimizer, theirs, 1)
        params, state = run(ours, params, 1, state)
        for name, p in theirs.items():
            kept = {k: v for k, v in optimizer.state[p].items() if v is not None}
            if not hasattr(state[name], "step"):  # of rules that do not count their steps
                kept.pop("step", None)
            own = torch_state(kind, state[name])
            assert set(kept) <= set(own)
            assert_same({key: own[key] for key in kept}, kept)


@pytest.mark.parametrize(("lr", "steps"), [(0.5, 6), (2.0, 2)])
def test_large_rates_of_adafactor_are_bounded_by_the_number_of_steps(lr: float, steps: int) -> None:
    """By one over its square root, as in torch."""
    theirs = {name: p.requires_grad_() for name, p in start().items()}
    step_torch(torch.optim.Adafactor(list(theirs.values()), lr=lr), theirs, steps)
    ours, _ = run(translate(torch.optim.Adafactor, {"lr": lr}), start(), steps)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_adafactor_without_memory_forgets_larger_gradients(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """As in torch, and not up to rounding of what it forgets."""
    theirs = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = torch.optim.Adafactor([theirs], lr=LR, beta2_decay=0.0)
    ours = translate(torch.optim.Adafactor, {"lr": LR, "beta2_decay": 0.0})
    params: dict[str, Any] = {"w": theirs.detach().clone()}
    state = ours.init(params)
    for step in range(4):
        theirs.grad = torch.linspace(0.1, 2, theirs.numel(), dtype=dtype).reshape(shape)
        theirs.grad *= 1e-5**step
        optimizer.step()
        params, state = ours.update({"w": theirs.grad}, state, params, ours.hyper)
    torch.testing.assert_close(params["w"], theirs.detach(), rtol=1e-6, atol=0)
    if dtype == torch.float64:
        torch.testing.assert_close(params["w"], theirs.detach(), rtol=1e-12, atol=0)


def test_each_dense_optimizer_of_torch_is_here() -> None:
    there = {
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    refused = there - set(OPTIMIZERS)
    assert {kind.__name__ for kind in refused} == {"LBFGS", "SparseAdam"}
    for kind in refused:
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot be unrolled: "):
            translate(kind, {})
    assert set(CASES) == set(OPTIMIZERS)


@pytest.mark.parametrize("kind", CASES)
def test_each_option_of_torch_is_compared_or_passed_over(kind: type[Optimizer]) -> None:
    parameters = inspect.signature(kind).parameters
    compared = {
        option
        for options in CASES[kind]
        for option, value in options.items()
        if value != parameters[option].default
    }
    assert compared | {"lr"} == set(parameters) - {"params"} - IGNORED
    for option in IGNORED & set(parameters):
        assert translate(kind, {option: True}).hyper == translate(kind, {}).hyper


@pytest.mark.parametrize("kind", CASES)
def test_defaults_are_those_of_torch(kind: type[Optimizer]) -> None:
    theirs = kind([torch.nn.Parameter(torch.ones(1, 1))]).param_groups[0]
    translated, default = translate(kind, theirs), OPTIMIZERS[kind]()
    assert translated.hyper == default.hyper
    for option, parameter in inspect.signature(OPTIMIZERS[kind]).parameters.items():
        if option in theirs:
            assert parameter.default == theirs[option]


@pytest.mark.parametrize("kind", CASES)
def test_unknown_options_and_classes_are_refused(kind: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} has no option speed"):
        translate(kind, {"lr": 0.1, "speed": 3})

    class Mine(kind):  # type: ignore[misc,valid-type]
        pass

    with pytest.raises(ValueError, match="Mine has no differentiable counterpart; there are: SGD"):
        translate(Mine, {})


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(ValueError, match="decoupled_weight_decay=False: AdamW without it is Adam"):
        translate(torch.optim.AdamW, {"decoupled_weight_decay": False})
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        sgd(nesterov=True)
    with pytest.raises(ValueError, match="unknown adjust_lr_fn 'mine': choose one of original"):
        muon(adjust_lr_fn="mine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown ns_precision 'double'"):
        muon(ns_precision="double")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ns_steps must be from 0 to 99, not 100"):
        muon(ns_steps=100)
    with pytest.raises(ValueError, match="ns_steps counts iterations and cannot be learned"):
        muon(ns_steps=torch.tensor(5.0))  # type: ignore[arg-type]


def test_muon_scales_the_lr_by_the_shape_as_it_is_told() -> None:
    """Against the formulas; torch itself has the third one only since lately."""
    p = {"tall": torch.randn(8, 2), "wide": torch.randn(2, 8)}
    steps = {}
    for kind in (None, "original", "match_rms_adamw", "spectral_unclamped"):
        optimizer = muon(1.0, weight_decay=0.0, adjust_lr_fn=kind)
        moved, _ = optimizer.update(p, optimizer.init(p), p, optimizer.hyper)
        steps[kind] = {name: (p[name] - moved[name]).norm() for name in p}
    ratio = {k: {n: float(step[n] / steps["original"][n]) for n in p} for k, step in steps.items()}
    assert ratio[None] == {"tall": 1, "wide": 1}
    by_rms = 0.2 * 8**0.5
    assert ratio["match_rms_adamw"] == pytest.approx({"tall": by_rms / 2, "wide": by_rms})
    assert ratio["spectral_unclamped"] == pytest.approx({"tall": 1, "wide": 0.5})


def test_muon_names_the_parameter_that_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"b has the shape \(3,\): give the others another"):
        muon().init({"w": torch.ones(2, 2), "b": torch.ones(3)})


@pytest.mark.parametrize("kind", CASES)
def test_update_changes_nothing_in_place(kind: type[Optimizer]) -> None:
    optimizer = translate(kind, CASES[kind][-1])
    params = start(kind)
    state = optimizer.init(params)
    optimizer.update(start(kind), state, params, optimizer.hyper)
    assert_same(params, start(kind))
    again = optimizer.update(start(kind), optimizer.init(params), params, optimizer.hyper)
    assert_same(optimizer.update(start(kind), state, params, optimizer.hyper)[0], again[0])


@pytest.mark.parametrize("kind", CASES)
def test_parameters_and_state_keep_their_type(kind: type[Optimizer]) -> None:
    """Step counts and bias corrections are float64; they must not spread."""
    params = {name: p.float() for name, p in start(kind).items()}
    for options in CASES[kind]:
        optimizer = translate(kind, options)
        single, state = run(optimizer, params, 2)
        assert {p.dtype for p in single.values()} == {torch.float32}
        batch = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
        batched = torch.func.vmap(lambda p, o=optimizer: run(o, p, 2)[0])(batch)
        assert {p.dtype for p in batched.values()} == {torch.float32}
        of_parameters = [x for x in pytree.tree_leaves(state) if x.dim() > 0]
        assert {x.dtype for x in of_parameters} <= {torch.float32}


@pytest.mark.parametrize("kind", CASES)
def test_compiled_steps_are_one_graph(kind: type[Optimizer]) -> None:
    """Within a partition by patterns; the inner gradient is in the graph, too."""
    whole = translate(kind, CASES[kind][-1])
    optimizer = partition([(["w", "k"], whole), (["[bs]"], whole)])
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: run(optimizer, p, 2)[0], fullgraph=True, backend="eager")
    assert_same(compiled(start(kind)), run(optimizer, start(kind), 2)[0])


@pytest.mark.parametrize(("kind", "options"), EVERY_CASE, ids=IDS)
def test_extreme_gradients_do_what_they_do_in_torch(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    if kind is torch.optim.Muon or kind is torch.optim.Adafactor:
        pytest.skip("each element of a matrix depends on all others")
    grad = torch.tensor([float("nan"), float("inf"), -1e15, 1e-30, 0.0], dtype=torch.float32)
    theirs = torch.nn.Parameter(torch.ones_like(grad))
    theirs.grad = grad.clone()
    optimizer = kind([theirs], **options)
    optimizer.step()
    ours = translate(kind, options)
    start = {"w": torch.ones_like(grad)}
    moved, _ = ours.update({"w": grad}, ours.init(start), start, ours.hyper)
    finite = theirs.detach().isfinite()
    assert torch.equal(moved["w"].isfinite(), finite) and finite[2:].all()
    torch.testing.assert_close(moved["w"][finite], theirs.detach()[finite])


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_that_begins_later_does_so_as_in_torch(dampening: float) -> None:
    theirs = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([theirs], lr=0.1, dampening=dampening)
    ours = sgd(0.1, dampening=dampening)
    params: dict[str, Any] = {"w": theirs.detach().clone()}
    state = ours.init(params)
    for step in range(6):
        momentum = 0.9 if step in (1, 2, 4, 5) else 0.0
        optimizer.param_groups[0]["momentum"] = momentum
        theirs.grad = 2 * theirs.detach() - 1 + step
        grads = {"w": 2 * params["w"] - 1 + step}
        optimizer.step()
        params, state = ours.update(grads, state, params, {**ours.hyper, "momentum": momentum})
        torch.testing.assert_close(params["w"], theirs.detach(), rtol=0, atol=1e-12)
        kept = torch_state(torch.optim.SGD, state["w"])
        assert ("momentum_buffer" in kept) == (step > 0)


EVERY = {case: translate(*each) for case, each in zip(IDS, EVERY_CASE, strict=True)}
EVERY |= {
    "newton": newton(),
    "newton joint": newton(joint=True),
    "newton within": newton(trust_radius=0.5),
}


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint"])
@pytest.mark.parametrize("case", EVERY)
def test_an_empty_parameter_stays_and_leaves_the_others_their_steps(
    case: str, gradient: Any
) -> None:
    optimizer = EVERY[case]
    full = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)}
    empty = {"none": torch.zeros(0, 2), "no row": torch.zeros(2, 0)}

    def loss(params: Params, step: int) -> Tensor:
        return sum(((p - 1).square().sum() for p in params.values()), torch.zeros(()))

    ends = [
        unroll(loss, params, optimizer, 3, gradient=gradient).params
        for params in (full, empty | full)
    ]
    assert list(ends[1]) == ["none", "no row", "w"]
    assert [tuple(ends[1][name].shape) for name in empty] == [(0, 2), (2, 0)]
    derivatives = [torch.autograd.grad(end["w"].square().sum(), full["w"])[0] for end in ends]
    assert_same({"w": ends[1]["w"], "d": derivatives[1]}, {"w": ends[0]["w"], "d": derivatives[0]})
