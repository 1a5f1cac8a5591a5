"""Derivatives of the functional optimizers: by start, state and every hyperparameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metarun.unroll import (
    Checkpoint,
    GradientMode,
    InnerOptimizer,
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    adamw,
    asgd,
    muon,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
    unroll,
)

F64 = torch.float64
_MOMENTS = {"lr": 0.05, "beta1": 0.7, "beta2": 0.8, "eps": 0.01, "weight_decay": 0.03}
_MUON = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "ns_precision": "full", "ns_steps": 3}

CASES: dict[Callable[..., InnerOptimizer], list[dict[str, Any]]] = {
    sgd: [
        {"lr": 0.1, "momentum": 0.6, "dampening": 0.2, "weight_decay": 0.03},
        {"lr": 0.1, "momentum": 0.6, "nesterov": True, "maximize": True},
    ],
    adam: [
        _MOMENTS,
        {**_MOMENTS, "amsgrad": True, "maximize": True},
        {**_MOMENTS, "decoupled_weight_decay": True},
    ],
    adamw: [_MOMENTS],
    nadam: [
        {**_MOMENTS, "momentum_decay": 0.3},
        {**_MOMENTS, "decoupled_weight_decay": True, "maximize": True},
    ],
    # The average gets long enough (rho > 5) at the sixth step with beta2 = 0.97, not with 0.7.
    radam: [
        {**_MOMENTS, "beta2": 0.97, "lr": 0.02},
        {**_MOMENTS, "beta2": 0.7, "decoupled_weight_decay": True, "maximize": True},
    ],
    adamax: [_MOMENTS, {**_MOMENTS, "maximize": True}],
    adadelta: [{"lr": 0.5, "rho": 0.8, "eps": 0.01, "weight_decay": 0.1}],
    adagrad: [
        {
            "lr": 0.1,
            "lr_decay": 0.2,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.2,
            "eps": 0.01,
        }
    ],
    rmsprop: [
        {"lr": 0.05, "alpha": 0.8, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.4},
        {"lr": 0.05, "alpha": 0.8, "eps": 0.01, "centered": True, "maximize": True},
    ],
    rprop: [
        {"lr": 0.9, "eta_minus": 0.4, "eta_plus": 1.3},
        {"lr": 0.9, "step_size_min": 0.47, "step_size_max": 1.0},
    ],
    asgd: [{"lr": 0.2, "lambd": 0.1, "alpha": 0.6, "t0": 0.5, "weight_decay": 0.1}],
    adafactor: [
        {"lr": 0.1, "beta2_decay": -0.7, "d": 1.02, "weight_decay": 0.1},
        {"lr": 0.1, "eps1": 0.4, "eps2": 3.0, "d": 3.0, "maximize": True},
    ],
    muon: [
        _MUON,
        {**_MUON, "nesterov": False, "eps": 20.0},
        {**_MUON, "adjust_lr_fn": "match_rms_adamw"},
    ],
}
EVERY_CASE = [(make, options) for make, several in CASES.items() for options in several]
IDS = [f"{make.__name__}-{options}" for make, options in EVERY_CASE]
STEPS = 6


def loss_of(params: dict[str, Tensor]) -> Tensor:
    w, b = params["w"], params["b"]
    return (w.sin() * b).sum() + 0.5 * (w - b).pow(2).sum() + (w * b.sum()).cos().sum()


def start() -> dict[str, Tensor]:
    """Two matrices, since Muon takes no other, of which one is a row."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, dtype=F64, generator=generator)
        for name, shape in {"w": (3, 2), "b": (1, 2)}.items()
    }


def run(
    optimizer: InnerOptimizer, params: Any, steps: int, state: Any = None, hyper: Any = None
) -> Any:
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        grads = torch.func.grad(loss_of)(params)
        params, state = optimizer.update(grads, state, params, hyper or optimizer.hyper)
    return params, state


def floats(state: Any) -> list[Tensor]:
    """The tensors of a state, without the step counts."""
    leaves, _ = pytree.tree_flatten_with_path(state)
    return [leaf for path, leaf in leaves if not str(path[-1]).endswith("step")]


def weighted(tensors: list[Tensor]) -> Tensor:
    """One number that depends on each element in its own way."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    return (flat * torch.arange(1, len(flat) + 1, dtype=F64).cos()).sum()


def outcome(
    make: Callable[..., InnerOptimizer], options: dict[str, Any], names: list[str]
) -> Callable[..., Tensor]:
    """A function of the hyperparameters in `names`, then of the start, to one number."""

    def of(*given: Tensor) -> Tensor:
        hyper, (w, b) = given[: len(names)], given[len(names) :]
        values = dict(zip(names, hyper, strict=True))
        params, state = run(make(**options), {"w": w, "b": b}, STEPS, hyper=values)
        return weighted([*params.values(), *floats(state)])

    return of


def inputs_of(make: Callable[..., InnerOptimizer], options: dict[str, Any]) -> dict[str, Tensor]:
    values = {k: torch.tensor(v, dtype=F64) for k, v in make(**options).hyper.items()}
    return {k: v.requires_grad_() for k, v in (values | start()).items()}


@pytest.mark.parametrize(("make", "options"), EVERY_CASE, ids=IDS)
def test_derivatives_by_start_and_every_hyperparameter(make, options: dict[str, Any]) -> None:
    inputs = inputs_of(make, options)
    of = outcome(make, options, list(make(**options).hyper))
    assert torch.autograd.gradcheck(of, list(inputs.values()))


@pytest.mark.parametrize("make", CASES)
def test_no_derivative_is_missing(make) -> None:
    """Each hyperparameter matters in one of the cases (a limit only where it binds)."""
    matters = set()
    for options in CASES[make]:
        inputs = inputs_of(make, options)
        of = outcome(make, options, list(make(**options).hyper))
        gradients = torch.autograd.grad(of(*inputs.values()), list(inputs.values()))
        matters |= {name for name, g in zip(inputs, gradients, strict=True) if (g != 0).any()}
    named = {name for options in CASES[make] for name in make(**options).hyper}
    assert matters == named | {"w", "b"}


@pytest.mark.parametrize(("make", "options"), EVERY_CASE, ids=IDS)
def test_derivatives_by_the_state(make, options: dict[str, Any]) -> None:
    optimizer = make(**options)
    params, state = run(optimizer, start(), 1)  # later, gradients kept by Rprop are zero
    leaves, spec = pytree.tree_flatten(state)
    inputs = [x.detach().clone().requires_grad_() for x in floats(state)]
    places = [next(i for i, leaf in enumerate(leaves) if leaf is x) for x in floats(state)]

    def of(*given: Tensor) -> Tensor:
        filled = list(leaves)
        for place, value in zip(places, given, strict=True):
            filled[place] = value
        end, last = run(optimizer, params, 2, pytree.tree_unflatten(filled, spec))
        return weighted([*end.values(), *floats(last)])

    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize(("make", "options"), EVERY_CASE, ids=IDS)
def test_meta_gradients_are_finite_where_gradients_are_exactly_zero(make, options) -> None:
    """A parameter without influence has second moments 0, where a root has no derivative."""
    of_interest = {k: v for k, v in options.items() if k not in ("eps", "eps1", "eps2")}
    of_interest |= {"initial_accumulator_value": 0.0} if make is adagrad else {}
    names = list(make(**of_interest).hyper)

    def of(*given: Tensor) -> Tensor:
        optimizer, hyper = make(**of_interest), dict(zip(names, given, strict=False))
        params = {"used": given[-2], "dead": given[-2] * 0, "unused": given[-1]}
        state = optimizer.init(params)
        for _ in range(3):
            grads = torch.func.grad(lambda p: (p["used"] ** 2).sum() + 0 * p["unused"].sum())(
                params
            )
            params, state = optimizer.update(grads, state, params, hyper)
        return weighted([*params.values(), *floats(state)])

    values = [torch.tensor(make(**of_interest).hyper[name], dtype=F64) for name in names]
    values += [torch.tensor([[1.5, -0.5]], dtype=F64), torch.tensor([[0.3, 0.7]], dtype=F64)]
    inputs = [value.requires_grad_() for value in values]
    result = of(*inputs)
    assert result.isfinite()
    for name, gradient in zip(
        [*names, "used", "unused"], torch.autograd.grad(result, inputs), strict=True
    ):
        assert gradient.isfinite().all(), name
    constant = [x.detach() for x in inputs[:-2]]
    assert torch.autograd.gradcheck(lambda *starts: of(*constant, *starts), inputs[-2:])


@pytest.mark.parametrize(("make", "options"), EVERY_CASE, ids=IDS)
def test_hyperparameters_as_tensors_take_the_same_steps(make, options: dict[str, Any]) -> None:
    constants = make(**options)
    tensors = {name: torch.tensor(v, dtype=F64) for name, v in constants.hyper.items()}
    ours, _ = run(constants, start(), 5, hyper=tensors)
    for name, p in run(constants, start(), 5)[0].items():
        torch.testing.assert_close(ours[name], p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("make", "options"), EVERY_CASE, ids=IDS)
def test_vmap_is_a_loop_with_learned_hyperparameters_too(make, options: dict[str, Any]) -> None:
    names = list(make(**options).hyper)
    of = outcome(make, options, names)
    factors = torch.tensor([1.0, 0.9, 0.95], dtype=F64)
    batches = [
        value.detach() * factors.view(-1, *[1] * value.dim())
        for value in inputs_of(make, options).values()
    ]
    gradient = torch.func.grad_and_value(of, argnums=tuple(range(len(batches))))
    together, values = vmap(gradient)(*batches)
    for i in range(3):
        alone, value = gradient(*(batch[i] for batch in batches))
        torch.testing.assert_close(values[i], value, rtol=1e-12, atol=0)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself
@pytest.mark.parametrize("make", CASES)
def test_forward_mode_agrees_with_reverse_mode(make) -> None:
    options = CASES[make][0]
    inputs = {k: v.detach() for k, v in inputs_of(make, options).items()}
    of = outcome(make, options, list(make(**options).hyper))
    arguments = tuple(inputs.values())
    tangents = tuple(torch.ones_like(x) for x in arguments)
    _, forward = torch.func.jvp(of, arguments, tangents)
    gradients = torch.func.grad(of, argnums=tuple(range(len(arguments))))(*arguments)
    reverse = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["mixed", Checkpoint(2)], ids=str)
@pytest.mark.parametrize("make", CASES)
def test_modes_that_recompute_steps_carry_every_state(make, mode: GradientMode) -> None:
    options = CASES[make][-1]
    inputs = inputs_of(make, options)
    names = list(make(**options).hyper)

    def gradients(how: GradientMode) -> tuple[Tensor, ...]:
        hyper = {name: inputs[name] for name in names}
        params = {name: inputs[name] for name in ("w", "b")}
        end = unroll(
            lambda p, step: loss_of(p), params, make(**options), 3, hyper=hyper, gradient=how
        )
        return torch.autograd.grad(loss_of(end.params), list(inputs.values()), allow_unused=True)

    for a, b in zip(gradients(mode), gradients("reverse"), strict=True):
        b = torch.zeros_like(a) if b is None and a is not None else b
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def central_difference(of: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    return (of(x + h) - of(x - h)) / (2 * h)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (adam, "beta2", 0.9),  # goes through the bias correction
        (asgd, "lr", 0.2),  # goes through the step size of the next step
        (adagrad, "initial_accumulator_value", 0.3),  # read at the first step
        (rprop, "lr", 0.3),  # likewise
        (nadam, "momentum_decay", 0.4),  # goes through a product over steps
        (adafactor, "beta2_decay", -0.6),
    ],
)
def test_hypergradients_that_are_easily_lost(make, name: str, value: float) -> None:
    """Against finite differences of the loss after eight steps."""

    def after(x: Tensor) -> Tensor:
        return loss_of(run(make(**({"lr": 0.05} | {name: x})), start(), 8)[0])

    x = torch.tensor(value, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(after(x), x)
    expected = central_difference(after, x.detach())
    assert expected.abs() > 1e-6
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_a_constant_zero_momentum_costs_nothing_and_a_tensor_zero_can_be_learned() -> None:
    zero = torch.zeros((), dtype=F64, requires_grad=True)
    result, _ = run(sgd(lr=0.05, momentum=zero), start(), 3)
    plain, _ = run(sgd(lr=0.05), start(), 3)
    for name, p in result.items():
        torch.testing.assert_close(p.detach(), plain[name], rtol=1e-14, atol=1e-15)
    (gradient,) = torch.autograd.grad(loss_of(result), zero)
    assert gradient != 0


def test_muon_in_bfloat16_has_derivatives_of_its_precision() -> None:
    def gradient(precision: str) -> Tensor:
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        params, _ = run(muon(lr, ns_precision=precision), start(), 3)
        return torch.autograd.grad(loss_of(params), lr)[0]

    torch.testing.assert_close(gradient("bfloat16"), gradient("full"), rtol=0.05, atol=0)
