"""The functional optimizers against torch.optim, and their derivatives."""

import pytest
import torch
from torch import Tensor

from metarun.unroll import InnerOptimizer, adam, sgd

SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.7, "dampening": 0.3},
    {"weight_decay": 0.05},
    {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.02},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
]
ADAM_OPTIONS = [
    {},
    {"beta1": 0.5, "beta2": 0.9},
    {"eps": 1e-3},
    {"weight_decay": 0.1},
    {"beta1": 0.0, "beta2": 0.99},
]


def loss_of(params: dict[str, Tensor]) -> Tensor:
    """Neither quadratic nor separable, so that wrong moments cannot hide."""
    w, b = params["w"], params["b"]
    return (w.sin() * b).sum() + (w - b).pow(4).mean() + (w * b.sum()).cos().sum()


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(4, 3, dtype=torch.float64, generator=generator),
        "b": torch.randn(3, dtype=torch.float64, generator=generator),
    }


def run(optimizer: InnerOptimizer, params: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    state = optimizer.init(params)
    for _ in range(steps):
        grads = torch.func.grad(loss_of)(params)
        params, state = optimizer.update(grads, state, params, optimizer.hyper)
    return params


def run_torch(kind: type[torch.optim.Optimizer], steps: int, **options: object) -> dict:
    params = {name: p.clone().requires_grad_() for name, p in start().items()}
    optimizer = kind(list(params.values()), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
    return params


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_takes_the_steps_of_torch(options: dict) -> None:
    theirs = run_torch(torch.optim.SGD, 20, lr=0.03, **options)
    assert_same(run(sgd(lr=0.03, **options), start(), 20), theirs)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_adam_takes_the_steps_of_torch(options: dict) -> None:
    names = {"beta1": 0.9, "beta2": 0.999} | options
    rest = {k: v for k, v in options.items() if k not in ("beta1", "beta2")}
    betas = (names["beta1"], names["beta2"])
    theirs = run_torch(torch.optim.Adam, 20, lr=0.03, betas=betas, **rest)
    assert_same(run(adam(lr=0.03, **options), start(), 20), theirs)


@pytest.mark.parametrize("make", [sgd, adam])
def test_hyperparameters_as_tensors_take_the_same_steps(make) -> None:
    constants = {k: 0.3 if k != "lr" else 0.02 for k in make().hyper}
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in constants.items()}
    assert_same(run(make(**tensors), start(), 5), run(make(**constants), start(), 5))


@pytest.mark.parametrize("make", [sgd, adam])
def test_derivatives_with_respect_to_every_hyperparameter_and_the_start(make) -> None:
    values = {"lr": 0.05, "momentum": 0.6, "dampening": 0.2, "weight_decay": 0.03}
    values |= {"beta1": 0.7, "beta2": 0.8, "eps": 1e-2}
    names = list(make().hyper)
    inputs = [torch.tensor(values[n], dtype=torch.float64, requires_grad=True) for n in names]
    inputs += [p.requires_grad_() for p in start().values()]

    def after_three_steps(*given: Tensor) -> Tensor:
        hyper, (w, b) = given[: len(names)], given[len(names) :]
        params = run(make(**dict(zip(names, hyper, strict=True))), {"w": w, "b": b}, 3)
        return loss_of(params)

    assert torch.autograd.gradcheck(after_three_steps, inputs)
    gradients = torch.autograd.grad(after_three_steps(*inputs), inputs)
    assert all(gradient.abs().sum() > 0 for gradient in gradients), "a derivative is missing"


def test_nesterov_is_differentiable_too() -> None:
    momentum = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def after(mu: Tensor) -> Tensor:
        return loss_of(run(sgd(lr=0.05, momentum=mu, nesterov=True), start(), 3))

    assert torch.autograd.gradcheck(after, [momentum])


def test_adam_has_finite_meta_gradients_where_the_second_moment_is_exactly_zero() -> None:
    """A parameter without influence has v = 0, where sqrt has an infinite derivative."""

    def after(x: Tensor) -> Tensor:
        optimizer = adam(lr=0.1)
        params = {"used": x, "dead": x}
        state = optimizer.init(params)
        for _ in range(3):
            grads = torch.func.grad(lambda p: (p["used"] ** 2).sum() + 0 * p["dead"].sum())(params)
            params, state = optimizer.update(grads, state, params, optimizer.hyper)
        return (params["used"] + params["dead"]).sum()

    x = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(after(x), x)
    assert gradient.isfinite().all()
    assert torch.autograd.gradcheck(after, [x])


def test_a_constant_zero_momentum_costs_nothing_and_a_tensor_zero_can_be_learned() -> None:
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    result = run(sgd(lr=0.05, momentum=zero), start(), 3)
    assert_same({k: v.detach() for k, v in result.items()}, run(sgd(lr=0.05), start(), 3))
    (gradient,) = torch.autograd.grad(loss_of(result), zero)
    assert gradient != 0


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(options: dict) -> None:
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        sgd(nesterov=True, **options)


@pytest.mark.parametrize("make", [sgd, adam])
def test_update_changes_nothing_in_place(make) -> None:
    optimizer = make(lr=0.1)
    params = start()
    state = optimizer.init(params)
    grads = torch.func.grad(loss_of)(params)
    optimizer.update(grads, state, params, optimizer.hyper)
    assert_same(params, start())
    assert all(s.step == 0 for s in state.values())
