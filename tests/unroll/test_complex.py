"""Complex parameters: the steps of torch.optim and their derivatives, or a refusal."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Muon, Optimizer

import metarun.higher as higher
from metarun.unroll import (
    META_CURVATURE,
    Checkpoint,
    InnerOptimizer,
    adam,
    clip_norm,
    clip_value,
    from_torch,
    learn_hyper,
    map_tasks,
    mixed,
    newton,
    partition,
    precondition,
    sgd,
    translate,
    unroll,
)
from metarun.unroll.multi import newton_step
from tests.unroll.optim_cases import EVERY_CASE

C128, F64 = torch.complex128, torch.float64
CASES = [(kind, options) for kind, options in EVERY_CASE if kind not in (Adafactor, Muon)]
IDS = [f"{kind.__name__}-{options}" for kind, options in CASES]
KINDS = {kind: options for kind, options in CASES}


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """torch keeps some numbers in its default type (ASGD's eta, NAdam's product of momenta)."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start() -> dict[str, Tensor]:
    """Complex parameters of several shapes, and a real one beside them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 2), "b": (2,), "s": ()}
    params = {n: torch.randn(s, dtype=C128, generator=generator) for n, s in shapes.items()}
    return {**params, "r": torch.randn(2, dtype=F64, generator=generator)}


def loss_of(p: Any, step: int = 0) -> Tensor:
    """Neither holomorphic nor separable."""
    out = (p["w"] * p["b"] + p["s"] * p["b"].conj()).sin() * p["r"]
    return 0.1 * (out.abs().pow(2).sum() + out.real.sum() + (p["w"].imag * p["r"]).cos().sum())


def assert_same(ours: Any, theirs: Any) -> None:
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-12, atol=1e-12)


def stepped(optimizer: Optimizer, params: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
def test_steps_are_those_of_torch(kind: type[Optimizer], options: dict[str, Any]) -> None:
    params = start()
    theirs = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    stepped(kind(theirs.values(), lr=0.05, **options), theirs, 7)
    ours = unroll(loss_of, params, translate(kind, {"lr": 0.05, **options}), 7)
    assert_same(ours.params, theirs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("already", [0, 3])
def test_a_live_optimizer_is_gone_on_from(already: int, kind: type[Optimizer]) -> None:
    options = KINDS[kind]
    theirs = {name: nn.Parameter(p.clone()) for name, p in start().items()}
    live = kind(theirs.values(), lr=0.05, **options)
    stepped(live, theirs, already)
    optimizer, state = from_torch(live, theirs.items())
    here = {name: p.detach().clone() for name, p in theirs.items()}
    ours = unroll(loss_of, here, optimizer, 4, state=state)
    stepped(live, theirs, 4)
    assert_same(ours.params, theirs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("already", [0, 2])
def test_the_drop_in_takes_the_same_steps(already: int, kind: type[Optimizer]) -> None:
    options = KINDS[kind]
    model = nn.ParameterDict({name: nn.Parameter(p) for name, p in start().items()})
    live = kind(model.parameters(), lr=0.05, **options)
    stepped(live, model, already)
    with higher.innerloop_ctx(model, live) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(loss_of(fmodel))
        ours = dict(fmodel.items())
        written_back = diffopt.state_dict()
    stepped(live, model, 3)
    assert_same(ours, dict(model.items()))
    for index, p in enumerate(live.state):
        for key, value in live.state[p].items():
            if key != "step" and value is not None:
                mine = written_back["state"][index][key]
                torch.testing.assert_close(mine, value, rtol=1e-12, atol=1e-12)


def assert_derivative(optimizer: InnerOptimizer, gradient: Any = "reverse") -> None:
    """Along a random direction in all real and imaginary parts and the lr."""
    params, lr = start(), torch.tensor(0.05, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    along = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in params.items()}

    def outer(p: Any, lr: Tensor) -> Tensor:
        names = [name for name in optimizer.hyper if name.rpartition(".")[2] == "lr"]
        hyper = {**optimizer.hyper, **dict.fromkeys(names, lr)}
        end = unroll(loss_of, p, optimizer, 3, hyper=hyper, gradient=gradient)
        return sum((x.abs().pow(3).sum() for x in end.params.values()), lr.new_zeros(()))

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    rate = lr.clone().requires_grad_()
    *grads, of_lr = torch.autograd.grad(outer(leaves, rate), [*leaves.values(), rate])
    slope = of_lr * 0.1
    for grad, direction in zip(grads, along.values(), strict=True):
        slope = slope + (grad.conj() * direction).real.sum()
    h = 1e-6
    ahead, behind = (
        outer({n: p + sign * along[n] for n, p in params.items()}, lr + sign * 0.1)
        for sign in (h, -h)
    )
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_derivatives_are_right(kind: type[Optimizer]) -> None:
    assert_derivative(translate(kind, KINDS[kind] | {"lr": 0.05}))


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed", Checkpoint(2)], ids=str)
@pytest.mark.parametrize("optimizer", [sgd(0.05, momentum=0.9), adam(0.05)], ids=["sgd", "adam"])
def test_other_modes_are_right_too(optimizer: InnerOptimizer, gradient: Any) -> None:
    assert_derivative(optimizer, gradient)


WRAPPED = {
    "clip_norm": clip_norm(sgd(0.05), 0.1),
    "partition": partition([("[wb]", adam(0.05)), ("[sr]", sgd(0.05, momentum=0.5))]),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_optimizers_are_right(name: str) -> None:
    assert_derivative(WRAPPED[name])


def test_the_norm_of_complex_gradients_is_that_of_torch() -> None:
    theirs = {name: nn.Parameter(p.clone()) for name, p in start().items()}
    live = torch.optim.SGD(theirs.values(), 0.05)
    for _ in range(3):
        live.zero_grad()
        loss_of(theirs).backward()
        nn.utils.clip_grad_norm_(theirs.values(), 0.1)
        live.step()
    assert_same(unroll(loss_of, start(), clip_norm(sgd(0.05), 0.1), 3).params, theirs)


def test_newton_moves_real_parameters_beside_complex_ones() -> None:
    optimizer = mixed([("[wbs]", adam(0.05)), ("r", newton(trust_radius=0.1))])
    params = {name: p.requires_grad_() for name, p in start().items()}
    end = unroll(loss_of, params, optimizer, 2)
    grads = torch.autograd.grad(loss_of(end.params), list(params.values()))
    h = 1e-6
    w = torch.view_as_real(params["w"].detach().clone())
    values = []
    for sign in (h, -h):
        w[0, 1, 1] += sign
        moved = {**start(), "w": torch.view_as_complex(w.clone())}
        values.append(loss_of(unroll(loss_of, moved, optimizer, 2).params))
        w[0, 1, 1] -= sign
    slope = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(grads[0][0, 1].imag, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_tasks_can_be_mapped(kind: type[Optimizer]) -> None:
    optimizer = translate(kind, KINDS[kind] | {"lr": 0.05})

    def task(meta: Any, scale: Tensor) -> Any:
        return unroll(lambda p, s: scale * loss_of(p), dict(meta), optimizer, 3).params

    tasks = torch.tensor([1.0, 2.0], dtype=F64)
    ours, theirs = (map_tasks(task, start(), tasks, how) for how in ("vmap", "loop"))
    assert_same(ours, theirs)


def test_a_rate_for_each_element_serves_both_of_its_parts() -> None:
    rates = torch.tensor([0.1, 0.2], dtype=F64)
    params = {"b": torch.tensor([1 + 1j, 2 - 1j], dtype=C128)}
    hyper = {**sgd().hyper, "lr": {"b": rates}}
    end = unroll(lambda p, s: p["b"].abs().pow(2).sum() / 2, params, sgd(), 1, hyper=hyper)
    torch.testing.assert_close(end.params["b"], params["b"] * (1 - rates))


def test_learned_rates_of_complex_parameters_are_real() -> None:
    learned = learn_hyper(sgd(0.1).hyper, ["lr"], "parameter_step", start(), 3)
    assert {value.dtype for value in learned.initial.values()} == {F64}


# ---------------------------------------------------------------- refusals

ONE = {"w": torch.ones(2, 2, dtype=C128)}


def modulus(p: Any, step: int) -> Tensor:
    return p["w"].abs().pow(2).sum()


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (translate(Adafactor, {"lr": 0.1}), "adafactor"),
        (translate(Muon, {"lr": 0.1}), "muon"),
        (newton(), "newton"),
        (newton(joint=True), "newton"),
        (mixed([("w", newton())]), "newton"),
        (clip_value(sgd(0.1), 0.1), "clip_value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_optimizers_without_a_rule_refuse(optimizer: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} does not take complex.*view_as_real"):
        unroll(modulus, ONE, optimizer, 1)


def test_preconditioners_refuse() -> None:
    with pytest.raises(ValueError, match="precondition does not take complex"):
        precondition(sgd(0.1), META_CURVATURE, ONE)
    with pytest.raises(ValueError, match="newton_step does not take complex"):
        newton_step(modulus(ONE, 0), ONE["w"])


@pytest.mark.parametrize("gradient", ["implicit", "evolution"])
def test_modes_of_real_formulas_refuse(gradient: Any) -> None:
    with pytest.raises(ValueError, match=r"do not take complex.*checkpoint"):
        unroll(modulus, ONE, sgd(0.1), 1, gradient=gradient)


def test_complex_hyperparameters_are_refused() -> None:
    hyper = {**sgd().hyper, "lr": torch.tensor(0.1j, dtype=C128)}
    with pytest.raises(ValueError, match="lr is complex"):
        unroll(modulus, ONE, sgd(), 1, hyper=hyper)


@pytest.mark.parametrize("kind", [Adafactor, Muon], ids=lambda kind: kind.__name__)
def test_the_drop_in_refuses_what_torch_refuses(kind: Any) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(ONE["w"])})
    opt = kind(model.parameters(), lr=0.1)
    refused = pytest.raises(ValueError, match="does not take complex")
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt), refused:
        diffopt.step(modulus(fmodel, 0))
