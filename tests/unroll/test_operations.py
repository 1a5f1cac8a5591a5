"""Operations whose derivatives torch gets wrong: right here, or refused."""

import contextlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import metarun.higher as higher
from metarun.unroll import (
    BlockLoss,
    RecordedLoss,
    RightDerivatives,
    meta_gradient,
    multi,
    newton,
    recorded,
    sgd,
    unroll,
)
from metarun.unroll.advice import UnsuitableModel
from metarun.unroll.corrected import right_derivatives
from metarun.unroll.gradients import mixed_check as check
from tests.conftest import REPO

F64 = torch.float64
Loss = Callable[[Tensor], Tensor]
FALLS_BACK = "gradient='mixed' falls back to 'checkpoint'"
ZOO = REPO / "scripts" / "op_zoo"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def end(loss: Loss, w: Tensor, gradient: Any = "reverse", optimizer: Any = None) -> Tensor:
    """A nonlinear scalar of where two steps end."""
    steps = 2 if optimizer is None else 3
    start = {"w": w}
    unrolled = unroll(
        lambda p, _: loss(p["w"]), start, optimizer or sgd(0.1), steps, gradient=gradient
    )
    return (unrolled.params["w"] * torch.arange(1.0, w.numel() + 1).view_as(w)).sin().sum()


def derivative(loss: Loss, w: Tensor, gradient: Any = "reverse", optimizer: Any = None) -> Tensor:
    w = w.clone().requires_grad_()
    return torch.autograd.grad(end(loss, w, gradient, optimizer), w)[0]


def by_differences(loss: Loss, w: Tensor, optimizer: Any = None, h: float = 1e-4) -> Tensor:
    """The same by central differences, extrapolated (Richardson)."""

    def at(direction: Tensor, h: float) -> Tensor:
        ends = [end(loss, w + s * h * direction, "reverse", optimizer) for s in (1, -1)]
        return (ends[0] - ends[1]) / (2 * h)

    with torch.no_grad():
        basis = torch.eye(w.numel(), dtype=F64).view(-1, *w.shape)
        slopes = [(4 * at(e, h / 2) - at(e, h)) / 3 for e in basis]
    return torch.stack(slopes).view_as(w)


def close(ours: Tensor, right: Tensor, rtol: float = 1e-7) -> None:
    torch.testing.assert_close(ours, right, rtol=rtol, atol=rtol * float(right.abs().max()))


# ------------------------------------------------------------------------------ mixed mode


def gram(w: Tensor) -> Tensor:
    return torch.eye(len(w), dtype=F64) + w @ w.T


ONES = torch.ones(3, dtype=F64)
TANGENTS: dict[str, tuple[Loss, Tensor]] = {
    "logdet": (lambda w: torch.logdet(gram(w)), random(3, 3)),
    "slogdet": (lambda w: torch.linalg.slogdet(gram(w)).logabsdet, random(3, 3)),
    "det": (lambda w: gram(w).det().log(), random(3, 3)),
    "ridge head": (lambda w: (torch.linalg.solve(gram(w), w @ ONES) ** 2).sum(), random(3, 3)),
    "gaussian process": (
        lambda w: torch.logdet(gram(w)) + ONES @ torch.linalg.solve(gram(w), ONES),
        random(3, 3),
    ),
    "cumprod with a zero": (lambda w: w.cumprod(0).sum(), torch.tensor([2.0, 0.0, 3.0], dtype=F64)),
    "prod with zeros": (
        lambda w: w.prod() + w.square().sum(),
        torch.tensor([2.0, 0.0, 0.0], dtype=F64),
    ),
}
WRONG_TANGENTS: dict[str, tuple[Loss, Tensor]] = {
    "cholesky_inverse": (
        lambda w: (torch.cholesky_inverse(torch.linalg.cholesky(gram(w))) @ ONES).pow(2).sum(),
        random(3, 3),
    ),
    "triangular_solve": (
        lambda w: torch.triangular_solve(ONES[:, None], gram(w))[0].pow(2).sum(),
        random(3, 3),
    ),
    "scatter_reduce": (
        lambda w: (
            torch.ones(2, dtype=F64)
            .scatter_reduce(0, torch.tensor([0, 1, 0]), w, "prod")
            .pow(2)
            .sum()
        ),
        random(3),
    ),
}


@pytest.mark.parametrize("name", TANGENTS)
@pytest.mark.filterwarnings("error:gradient='mixed'")
def test_mixed_mode_gives_tangents_to_what_backward_passes_reuse(name: str) -> None:
    loss, w = TANGENTS[name]
    close(derivative(loss, w, "mixed"), by_differences(loss, w))


@pytest.mark.parametrize("name", TANGENTS)
def test_so_it_does_under_vmap_with_derivatives_inside_and_around(name: str) -> None:
    loss, w = TANGENTS[name]
    both = torch.stack([w, 0.9 * w])

    def mapped(gradient: str) -> tuple[Tensor, Tensor]:
        inside = torch.func.vmap(grad(lambda v: end(loss, v, gradient)))(both)
        leaves = both.clone().requires_grad_()
        ends = torch.func.vmap(lambda v: end(loss, v, gradient))(leaves)
        return inside, torch.autograd.grad(ends.sum(), leaves)[0]

    right = torch.stack([by_differences(loss, v) for v in both])
    for ours in mapped("mixed"):
        close(ours, right)


@pytest.mark.parametrize("name", WRONG_TANGENTS)
@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_mixed_mode_falls_back_where_a_tangent_of_torchs_is_wrong(name: str) -> None:
    loss, w = WRONG_TANGENTS[name]
    with pytest.warns(UserWarning, match=f"{FALLS_BACK}: torch's forward mode is wrong for {name}"):
        ours = derivative(loss, w, "mixed")
    close(ours, by_differences(loss, w))


class WrongTangent(torch.autograd.Function):
    """A square whose forward-mode rule forgets the factor 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * slope

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * tangent


def wrong_rule(w: Tensor) -> Tensor:
    return WrongTangent.apply(w).sin().sum()  # type: ignore[no-any-return, no-untyped-call]


def changed_gradient(w: Tensor) -> Tensor:
    v = w * w
    if v.requires_grad:
        v.register_hook(lambda g: g * v.detach().exp())  # type: ignore[no-untyped-call]
    return v.sin().sum()


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_mixed_mode_checks_itself_and_falls_back(batching: str) -> None:
    start = {"w": random(3)}
    tasks = torch.tensor([1.0, 2.0], dtype=F64)

    def of(gradient: str) -> Tensor:
        def task_loss(meta: Any, task: Tensor) -> tuple[Tensor, Tensor]:
            unrolled = unroll(
                lambda p, _, t: t * wrong_rule(p["w"]), dict(meta), sgd(0.1), 2, context=task,
                gradient=gradient,  # type: ignore[arg-type]
            )  # fmt: skip
            return unrolled.params["w"].exp().sum(), task

        return meta_gradient(task_loss, start, tasks, batching)[0]["w"]  # type: ignore[arg-type]

    with pytest.warns(UserWarning, match=f"{FALLS_BACK}: forward mode and reverse mode differ"):
        ours = of("mixed")
    close(ours, of("reverse"))


@pytest.mark.filterwarnings(f"ignore:{FALLS_BACK}")
def test_hooks_that_change_gradients_no_longer_mislead_mixed_mode() -> None:
    w = random(3)
    close(derivative(changed_gradient, w, "mixed"), derivative(changed_gradient, w, "checkpoint"))


@pytest.mark.filterwarnings(f"ignore:{FALLS_BACK}")
def test_dropout_after_attention_has_its_mask_in_mixed_mode() -> None:
    """Forward mode lays the attention's outputs out in another way, and masks follow that."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True).double()
    x = random(3, 5, 4)
    found = []
    for gradient in ("mixed", "reverse"):
        torch.manual_seed(1)
        params = {n: p.detach().requires_grad_() for n, p in layer.named_parameters()}
        ended = unroll(
            lambda p, _: functional_call(layer, p, (x,)).sin().mean(), params, sgd(0.5), 2,
            gradient=gradient,  # type: ignore[arg-type]
        )  # fmt: skip
        value = torch.stack([p.exp().sum() for p in ended.params.values()]).sum()
        grads = torch.autograd.grad(value, list(params.values()))
        found.append(torch.cat([g.flatten() for g in grads]))
    close(found[0], found[1], 1e-10)


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WrongTangent.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def test_mixed_mode_by_blocks_checks_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 3), Wrong(), nn.Linear(3, 1)).double()
    loss = BlockLoss(model, inputs=lambda x: x, loss=lambda out, _: out.sin().mean())
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}

    def of(gradient: Any) -> Tensor:
        ended = unroll(loss, params, sgd(0.1), 2, context=random(4, 2), gradient=gradient)
        value = torch.stack([p.exp().sum() for p in ended.params.values()]).sum()
        grads = torch.autograd.grad(value, list(params.values()))
        return torch.cat([g.flatten() for g in grads])

    with pytest.warns(UserWarning, match=f"{FALLS_BACK}: forward mode and reverse mode differ"):
        ours = of("mixed")
    close(ours, of("reverse"))


def test_mixed_mode_checks_a_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    whether = check._agrees
    monkeypatch.setattr(check, "_agrees", lambda *given: checked.append(1) or whether(*given))
    monkeypatch.setattr(check, "_agreed", type(check._agreed)())
    for _ in range(3):  # a new function each time, as it is in a training loop
        derivative(lambda w: w.sin().exp().sum(), random(4), "mixed")
    assert len(checked) == 1
    derivative(lambda w: w.cos().exp().sum(), random(4), "mixed")  # other operations
    derivative(lambda w: w.cos().exp().sum(), random(5), "mixed")  # other shapes
    assert len(checked) == 3


def test_the_check_draws_no_random_numbers() -> None:
    check._agreed.clear()
    torch.manual_seed(0)
    derivative(lambda w: w.exp().sum(), random(3), "mixed")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


# ------------------------------------------------------------------------------ weight norm


def hooked(layer: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return nn.utils.weight_norm(layer, **options)


NORMED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: parametrizations.weight_norm(nn.Linear(2, 1, bias=False)),
    "other dimension": lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=1),
    "whole": lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=None),
    "convolution": lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)),
    "hooks": lambda: hooked(nn.Linear(3, 2)),
    "hooks, other dimension": lambda: hooked(nn.Linear(3, 2), dim=1),
    "hooks, whole": lambda: hooked(nn.Linear(3, 2), dim=None),
}


class Written(nn.Module):
    """A layer with a weight norm, by hand."""

    def __init__(self, layer: nn.Module, dim: int | None) -> None:
        super().__init__()
        self.layer = [layer]  # not a submodule
        self.dim = dim
        self.names = [n for n, _ in layer.named_parameters()]
        self.weights = nn.ParameterList([p.detach().clone() for p in layer.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        given = dict(zip(self.names, self.weights, strict=True))
        (g,) = (p for n, p in given.items() if n.endswith(("_g", "original0")))
        (v,) = (p for n, p in given.items() if n.endswith(("_v", "original1")))
        over = [d for d in range(v.dim()) if d != self.dim]
        weight = g * v / v.square().sum(over, keepdim=True).sqrt()
        if isinstance(self.layer[0], nn.Linear):
            return F.linear(x, weight, given.get("bias"))
        return F.conv1d(x, weight, given.get("bias"))


def layers(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = NORMED[name]().double()
    dim = 1 if "other" in name else None if "whole" in name else 0
    x = random(4, 2, 3) if name == "convolution" else random(4, 2 if name == "linear" else 3)
    return layer, Written(layer, dim), x


def maml(layer: nn.Module, x: Tensor, gradient: Any = "reverse", optimizer: Any = None) -> Tensor:
    params = {n: p.detach().requires_grad_() for n, p in layer.named_parameters()}

    def loss(params: Any, step: int) -> Tensor:
        return functional_call(layer, params, (x,)).sin().mean()

    steps = 3 if optimizer else 2
    ended = unroll(loss, params, optimizer or sgd(0.5), steps, gradient=gradient)
    value = functional_call(layer, ended.params, (x + 1,)).exp().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(params.values()))])


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
def test_weight_norm_has_right_second_derivatives(name: str, gradient: str) -> None:
    layer, written, x = layers(name)
    close(maml(layer, x, gradient), maml(written, x), 1e-10)


@pytest.mark.parametrize("name", ["linear", "hooks"])
def test_weight_norm_has_right_third_derivatives(name: str) -> None:
    layer, written, x = layers(name)
    steps = newton(damping=20.0)
    close(maml(layer, x, optimizer=steps), maml(written, x, optimizer=steps), 1e-9)


@pytest.mark.parametrize("name", NORMED)
def test_weight_norm_is_right_in_the_drop_in(name: str) -> None:
    layer, written, x = layers(name)
    found = []
    for model in (layer, written):
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fast, diff):
            for _ in range(2):
                diff.step(fast(x).sin().mean())
            value = fast(x + 1).exp().mean()
        grads = torch.autograd.grad(value, list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    close(found[0], found[1], 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the loss after the unroll
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_weight_norm_is_right_where_tasks_are_mapped_or_recorded(batching: str) -> None:
    layer, written, x = layers("linear")
    tasks = torch.stack([x, x + 0.5])

    def of(model: nn.Module, record: bool) -> Tensor:
        def task_loss(meta: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            def loss(params: Any, step: int, x: Tensor) -> Tensor:
                return functional_call(model, params, (x,)).sin().mean()

            ended = unroll(loss, dict(meta), sgd(0.5), 2, context=x)
            return functional_call(model, ended.params, (x + 1,)).exp().mean(), x

        def gradient(meta: Any, tasks: Tensor) -> Any:
            return meta_gradient(task_loss, meta, tasks, batching)[0]  # type: ignore[arg-type]

        meta = {n: p.detach() for n, p in model.named_parameters()}
        grads = (recorded(gradient) if record else gradient)(meta, tasks)
        return torch.cat([g.flatten() for g in grads.values()])

    for record in (False, True):
        close(of(layer, record), of(written, False), 1e-10)


def test_recorded_and_block_losses_write_weight_norm_out() -> None:
    layer, written, x = layers("linear")
    found = []
    for model in (layer, written):
        params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
        as_block = BlockLoss(
            nn.Sequential(model), inputs=lambda x: x, loss=lambda out, _: out.sin().mean()
        )
        as_recorded = RecordedLoss(
            lambda p, x, m=model: functional_call(m, p, (x,)).sin().mean(), recorded
        )
        for loss, mode in ((as_block, "reverse"), (as_block, "mixed"), (as_recorded, "checkpoint")):
            start = {f"0.{n}": p for n, p in params.items()} if loss is as_block else params
            ended = unroll(loss, start, sgd(0.5), 2, context=x, gradient=mode)  # type: ignore
            value = torch.stack([p.exp().sum() for p in ended.params.values()]).sum()
            grads = torch.autograd.grad(value, list(params.values()))
            found.append(torch.cat([g.flatten() for g in grads]))
    for ours, right in zip(found[:3], found[3:], strict=True):
        close(ours, right, 1e-10)


# ------------------------------------------------------------------------------ determinants


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
def test_a_determinant_has_a_second_derivative_at_the_identity(gradient: Any) -> None:
    """One step on det(I + w) from w = 0 subtracts 0.1 times the matrix of cofactors."""
    w = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    eye = torch.eye(2, dtype=F64)
    ended = unroll(
        lambda p, _: torch.linalg.det(eye + p["w"]), {"w": w}, sgd(0.1), 1, gradient=gradient
    )
    ours = torch.autograd.grad(ended.params["w"].sum(), w)[0]
    close(ours, torch.tensor([[0.9, 1.1], [1.1, 0.9]], dtype=F64), 1e-14)


def leibniz(A: Tensor) -> Tensor:
    """A determinant of three rows by its definition."""
    a, b, c = A
    return torch.linalg.cross(a, b) @ c


SINGULAR = {
    "rank 2": [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 0.0, 1.0]],
    "rank 1": [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]],
    "rank 0": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    "regular": [[1.0, 2.0, 3.0], [2.0, -4.0, 6.0], [1.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("matrix", SINGULAR.values(), ids=SINGULAR)
def test_a_determinant_has_right_derivatives_of_each_order(matrix: list[list[float]]) -> None:
    A = torch.tensor(matrix, dtype=F64)
    ours, right = torch.linalg.det, leibniz
    with RightDerivatives(2):
        for _ in range(4):
            found, expected = ours(A), right(A)
            torch.testing.assert_close(
                found, expected, rtol=1e-8, atol=1e-12 * float(expected.abs().max() + 1)
            )
            ours = torch.func.jacrev(ours)
            right = torch.func.jacrev(right)


# ------------------------------------------------------------------------------ third derivatives


def norms() -> dict[str, tuple[Loss, Loss, Tensor]]:
    """Name -> a loss by torch's own norm, the same by hand, a point."""

    def standard(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        mean = x.mean(dims, keepdim=True)
        variance = (x * x).mean(dims, keepdim=True) - mean**2
        return (x - mean) / (variance + 1e-5).sqrt()

    x, more = random(3, 4), random(3, 4, 5)
    affine = torch.arange(1.0, 5.0, dtype=F64)
    found = {
        "layer": (
            lambda w: F.layer_norm(w + x, (4,), affine, affine),
            lambda w: standard(w + x, (-1,)) * affine + affine,
            random(4, seed=1),
        ),
        "group": (
            lambda w: F.group_norm(w + more, 2, affine, affine),
            lambda w: (
                standard((w + more).view(3, 2, -1), (-1,)).view(3, 4, 5) * affine[:, None]
                + affine[:, None]
            ),
            random(5, seed=1),
        ),
        "batch": (
            lambda w: F.batch_norm(w * x + 1, None, None, affine, affine, training=True),
            lambda w: standard(w * x + 1, (0,)) * affine + affine,
            random(3, 1, seed=1),
        ),
        "batch, evaluated": (
            lambda w: F.batch_norm(w * x, affine, affine, affine, affine),
            lambda w: (w * x - affine) / (affine + 1e-5).sqrt() * affine + affine,
            random(3, 1, seed=1),
        ),
        "instance": (
            lambda w: F.instance_norm(w * more, None, None, affine, affine),
            lambda w: standard(w * more, (-1,)) * affine[:, None] + affine[:, None],
            random(5, seed=1),
        ),
        "root mean square": (
            lambda w: F.rms_norm(w + x, (4,), affine, 1e-5),
            lambda w: (w + x) / ((w + x).square().mean(-1, keepdim=True) + 1e-5).sqrt() * affine,
            random(4, seed=1),
        ),
    }
    return {name: (scalar(a), scalar(b), w) for name, (a, b, w) in found.items()}  # type: ignore


def scalar(norm: Loss) -> Loss:
    return lambda w: norm(w).sin().sum()


NORMS = norms()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("gradient", ["reverse", "checkpoint"])
def test_newton_steps_through_norms_are_right(name: str, gradient: str) -> None:
    loss, written, w = NORMS[name]
    steps = newton(damping=20.0)
    close(derivative(loss, w, gradient, steps), derivative(written, w, "reverse", steps), 1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_so_they_are_under_vmap(name: str) -> None:
    loss, written, w = NORMS[name]
    both = torch.stack([w, 0.9 * w])
    ours = torch.func.vmap(grad(lambda v: end(loss, v, "reverse", newton(damping=20.0))))(both)
    right = [derivative(written, v, "reverse", newton(damping=20.0)) for v in both]
    close(ours, torch.stack(right), 1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_an_unroll_within_another_has_right_third_derivatives(name: str) -> None:
    """The inner one's gradient, the outer one's, and the meta-gradient."""
    loss, written, w = NORMS[name]
    ours, right = (derivative(lambda v, fn=fn: end(fn, v), w) for fn in (loss, written))
    close(ours, right, 1e-9)


def by_get_step(loss: Loss, w: Tensor, written_out: bool) -> Tensor:
    w = w.clone().requires_grad_()
    optimizer, params = multi.Newton(damping=20.0), {"w": w}
    for _ in range(3):
        if written_out:
            with RightDerivatives():
                value = loss(params["w"])
        else:
            value = loss(params["w"])
        params = optimizer.get_step(value, params)
    return torch.autograd.grad(params["w"].exp().sum(), w)[0]


@pytest.mark.parametrize("name", ["layer", "group", "batch", "instance"])
def test_losses_for_get_step_are_refused_unless_their_norms_are_written_out(name: str) -> None:
    loss, written, w = NORMS[name]
    with pytest.raises(ValueError, match=f"{name}.*_norm are wrong at order 3.*RightDerivatives"):
        by_get_step(loss, w, written_out=False)
    close(by_get_step(loss, w, True), by_get_step(written, w, False), 1e-9)


def test_running_statistics_are_updated_as_by_torchs_own_batch_norm() -> None:
    def instance_norm(x: Tensor, mean: Tensor, variance: Tensor, training: bool) -> Tensor:
        return F.instance_norm(x[:, :, None] * x[:, None, :], mean, variance)

    x = random(3, 4)
    kept = []
    for norm in (F.batch_norm, instance_norm):
        for order in (1, 3):
            mean, variance = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)
            if order == 3:
                with RightDerivatives():
                    norm(x, mean, variance, training=True)
            else:
                norm(x, mean, variance, training=True)
            kept.append(torch.stack([mean, variance]))
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[2], kept[3])
    assert kept[0].ne(0).all()


def prototypes(w: Tensor) -> Tensor:
    """Distances to some of the points themselves: zeros among them."""
    return F.cross_entropy(-torch.cdist(w, w[:2]), torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
@pytest.mark.filterwarnings(f"ignore:{FALLS_BACK}")
def test_distances_that_are_zero_are_right_under_vmap(gradient: str) -> None:
    both = torch.stack([random(4, 3), random(4, 3, seed=1)])
    ours = torch.func.vmap(grad(lambda v: end(prototypes, v, gradient)))(both)
    close(ours, torch.stack([by_differences(prototypes, v) for v in both]))


def test_newton_steps_through_distances_are_right() -> None:
    w, steps = random(4, 3), newton(damping=20.0)
    close(derivative(prototypes, w, "reverse", steps), by_differences(prototypes, w, steps))


POWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pow": torch.pow,
    "method": lambda x, v: x.pow(v),
    "operator": lambda x, v: x**v,
    "float_power": torch.float_power,
}


@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("optimizer", [None, newton(damping=20.0)], ids=["sgd", "newton"])
def test_powers_are_right_where_a_learned_exponent_is_a_whole_number(
    name: str, optimizer: Any
) -> None:
    """torch's second derivative takes the exponent zero for a constant."""
    bases = torch.tensor([1.5, 0.5, 2.0], dtype=F64)

    def loss(w: Tensor) -> Tensor:
        return POWERS[name](bases + w[:3].sin(), w[3:]).sin().sum()

    w = torch.tensor([0.1, 0.2, 0.3, 0.0, 1.0, 2.0], dtype=F64)
    close(derivative(loss, w, "reverse", optimizer), by_differences(loss, w, optimizer))


def test_powers_of_what_is_not_positive_are_torchs() -> None:
    x = torch.tensor([-2.0, 0.0, 0.0, 3.0], dtype=F64)
    exponent = torch.tensor([2.0, 0.0, 3.0, 2.0], dtype=F64, requires_grad=True)
    with RightDerivatives(2):
        ours = x**exponent
    torch.testing.assert_close(ours.detach(), x ** exponent.detach())


# ------------------------------------------------------------------------------ refusals

REFUSED: dict[str, tuple[Loss, Tensor, str]] = {
    "max_norm": (
        lambda w: F.embedding(torch.tensor([0, 1]), w, max_norm=0.5).sin().sum(),
        random(3, 2),
        "changes its weight in place.*torch.renorm",
    ),
    "as_strided_scatter": (
        lambda w: torch.as_strided_scatter(w, w[:1] * 2, (1,), (1,)).sin().sum(),
        random(3),
        "use slice_scatter",
    ),
    "bessel_j0": (
        lambda w: (torch.special.bessel_j0(w) + w.sin()).sum(),
        random(3),
        "takes special_bessel_j0 for a constant.*detach",
    ),
    "max_unpool": (
        lambda w: F.max_unpool1d(w, torch.tensor([[[0, 2]]]), 3, 1).sin().sum(),
        random(1, 1, 2),
        "windows that overlap.*stride that is not below",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operations_without_a_right_derivative_are_refused(name: str) -> None:
    loss, w, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        derivative(loss, w)


def test_max_unpool_without_overlap_is_right() -> None:
    def loss(w: Tensor) -> Tensor:
        return F.max_unpool1d(w.view(1, 1, 2), torch.tensor([[[0, 2]]]), 2).sin().sum()

    close(derivative(loss, random(2)), by_differences(loss, random(2)))


# ------------------------------------------------------------------------------ the zoo

FAST = [
    "nn.Conv2d", "nn.MultiheadAttention", "nn.orthogonal (cayley)", "nn.GroupNorm", "nn.MaxPool2d",
    "loss: cross_entropy", "loss: multivariate normal", "point: prod with two zeros", "linalg.inv",
]  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_a_part_of_the_zoo_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ZOO.parent))
    from op_zoo.measure import WAYS
    from op_zoo.run import results_of

    before = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = results_of(name)
    finally:
        torch.set_default_dtype(before)
    assert {r["way"] for r in results} == set(WAYS)
    verdicts = {r["verdict"] for r in results if not r["way"].startswith("newton")}
    assert verdicts == {"right"}, results
    assert not {r["verdict"] for r in results} & {"wrong", "failed", "not finite"}, results


def test_the_page_states_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ZOO.parent))
    from op_zoo.report import page

    kept = json.loads((REPO / "docs" / "operations.json").read_text())
    assert (REPO / "docs" / "operations.md").read_text() == page(kept)
    verdicts = {way[0] for found in kept["operations"].values() for way in found.values()}
    assert "wrong" not in verdicts
    assert len(kept["operations"]) == kept["expected"] > 700, "a part of a pass is no table"


# ------------------------------------------------------------ third derivatives, unexpected ones

PENALISED: dict[str, tuple[Loss, Loss]] = {
    "layer": (lambda x: F.layer_norm(x, (3,)), lambda x: standardised(x, -1)),
    "instance": (lambda x: F.instance_norm(x[None])[0], lambda x: standardised(x, -1)),
    "batch": (
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: standardised(x, 0),
    ),
    "group": (lambda x: F.group_norm(x, 1), lambda x: standardised(x, -1)),
    "layer module": (nn.LayerNorm(3, elementwise_affine=False), lambda x: standardised(x, -1)),
    "batch module": (
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        lambda x: standardised(x, 0),
    ),
    "power of zero": (
        lambda x: torch.zeros(3, 3, dtype=F64) ** (2 + x.sigmoid()) + x**3,
        lambda x: x**3,
    ),
}
TARGET = random(3, 3, seed=2)


def standardised(x: Tensor, dim: int) -> Tensor:
    """A normalisation by hand."""
    centred = x - x.mean(dim, keepdim=True)
    return centred / (centred.pow(2).mean(dim, keepdim=True) + 1e-5).sqrt()


def fitted(norm: Loss) -> Loss:
    scale = torch.arange(1.0, 4.0, dtype=F64)
    return lambda w: (norm(w * scale + w.roll(1, -1)) - TARGET).pow(2).sum()


def penalised(norm: Loss, by_transform: bool) -> Loss:
    """The squared norm of a gradient: the meta-gradient needs the third derivative."""
    loss = fitted(norm)

    def penalty(w: Tensor) -> Tensor:
        if by_transform:
            return grad(loss)(w).pow(2).sum()
        at = w if w.requires_grad else w.clone().requires_grad_()
        return torch.autograd.grad(loss(at), at, create_graph=True)[0].pow(2).sum()

    return penalty


def two_small_steps(loss: Loss, w: Tensor, gradient: Any = "reverse") -> Tensor:
    start = {"w": w}
    moved = unroll(lambda p, _: loss(p["w"]), start, sgd(1e-3), 2, gradient=gradient).params["w"]
    return (moved * torch.arange(1.0, 10.0, dtype=F64).view(3, 3)).sin().sum()


@pytest.mark.parametrize("by_transform", [False, True])
@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed", "drop-in"])
@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.filterwarnings("ignore:gradient='mixed'")
def test_a_gradient_penalty_in_the_inner_loss(name: str, gradient: str, by_transform: bool) -> None:
    norm, by_hand = PENALISED[name]
    w = random(3, 3)
    at = w.clone().requires_grad_()
    right = torch.autograd.grad(two_small_steps(penalised(by_hand, by_transform), at), at)[0]
    ours = w.clone().requires_grad_()
    loss = penalised(norm, by_transform)
    if gradient != "drop-in":
        found = torch.autograd.grad(two_small_steps(loss, ours, gradient), ours)[0]
    else:
        model = Weight(w, loss)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fnet, step):
            for _ in range(2):
                step.step(fnet())
            scale = torch.arange(1.0, 10.0, dtype=F64).view(3, 3)
            found = torch.autograd.grad((fnet.weight * scale).sin().sum(), model.weight)[0]
    close(found, right)


class Weight(nn.Module):
    def __init__(self, w: Tensor, loss: Loss) -> None:
        super().__init__()
        self.weight, self.loss = nn.Parameter(w.clone()), loss

    def forward(self) -> Tensor:
        return self.loss(self.weight)


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.filterwarnings("ignore:gradient='mixed'")
def test_the_hessian_of_a_meta_loss(name: str, gradient: str) -> None:
    norm, by_hand = PENALISED[name]
    hessians = []
    for loss, mode in ((fitted(norm), gradient), (fitted(by_hand), "reverse")):
        w = random(3, 3).requires_grad_()
        slope = torch.autograd.grad(two_small_steps(loss, w, mode), w, create_graph=True)[0]
        hessians.append(torch.autograd.grad(slope.sum(), w)[0])
    close(*hessians)


def test_forward_mode_around_a_recomputing_mode_says_what_to_use() -> None:
    loss = fitted(torch.sin)
    with pytest.raises(UnsuitableModel, match=r"gradient='reverse'.*jacrev"):
        torch.func.hessian(lambda w: two_small_steps(loss, w, "checkpoint"))(random(3, 3))


PLAIN_MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 2), (3, 4)), (nn.Conv1d(2, 2, 3), (1, 2, 5)), (nn.Conv2d(2, 2, 3), (1, 2, 5, 5)),
    (nn.Conv3d(2, 2, 3), (1, 2, 5, 5, 5)), (nn.Identity(), (3,)), (nn.Flatten(), (3, 2, 2)),
    (nn.Dropout(), (3, 4)),
    *((kind(), (3, 4)) for kind in (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU)),
    *((kind(), (3, 4)) for kind in (nn.Softplus, nn.Sigmoid, nn.Tanh)),
    (nn.MaxPool2d(2), (1, 2, 4, 4)), (nn.AvgPool2d(2), (1, 2, 4, 4)),
    (nn.AdaptiveAvgPool2d(1), (1, 2, 4, 4)),
]  # fmt: skip


def test_modules_that_leave_the_context_call_nothing_that_is_wrong() -> None:
    called = []

    class Listening(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    assert {type(module) for module, _ in PLAIN_MODULES} == right_derivatives.RIGHT_MODULES
    for module, shape in PLAIN_MODULES:
        for training in (True, False):
            with Listening():
                module.train(training)(torch.randn(shape))
    assert called and not [fn for fn in called if fn in RightDerivatives(2).table]


@pytest.mark.parametrize("order", [2, 3])
def test_only_the_context_of_second_order_steps_aside(order: int) -> None:
    """The fused layer norm is wrong at the third: there every module stays in the context."""
    seen = []
    forward = right_derivatives.aside(lambda: seen.append(torch._C._len_torch_function_stack()))
    with RightDerivatives(order):
        forward()
        assert torch._C._len_torch_function_stack() == 1, "it is put back"
    forward()
    assert seen == [order - 2, 0]
    raising = right_derivatives.aside(lambda: 1 / 0)
    with RightDerivatives(order), contextlib.suppress(ZeroDivisionError):
        raising()
    assert torch._C._len_torch_function_stack() == 0


V = {name: torch.rand(2, 3, dtype=F64) + 0.5 for name in ("x", "y")}
S = torch.rand(3, 3, dtype=F64)
E = torch.full((2, 3), 2.0, dtype=F64, requires_grad=True)
CALLS: dict[str, Callable[[], Tensor]] = {
    "pow": lambda: torch.pow(input=V["x"], exponent=E),
    "pow of a number": lambda: torch.pow(2.0, exponent=E),
    "Tensor.pow": lambda: V["x"].pow(exponent=E),
    "pow, no out": lambda: torch.pow(V["x"], E, out=None),
    "pow, out": lambda: torch.pow(input=V["x"], exponent=E.detach(), out=V["x"].clone()),
    "float_power": lambda: torch.float_power(input=V["x"], exponent=E),
    "Tensor.float_power": lambda: V["x"].float_power(exponent=E),
    "det": lambda: torch.det(input=S),
    "linalg.det": lambda: torch.linalg.det(A=S),
    "linalg.det, out": lambda: torch.linalg.det(S, out=torch.zeros((), dtype=F64)),
    "Tensor.det": lambda: S.det(),
    "cdist": lambda: torch.cdist(x1=V["x"], x2=V["y"]),
    "cdist, p": lambda: torch.cdist(V["x"], x2=V["y"], p=3.0),
    "weight norm": lambda: torch._weight_norm(v=V["x"], g=V["y"][:, :1], dim=0),
    "embedding": lambda: F.embedding(input=torch.tensor([1]), weight=V["x"]),
    "embedding bag": lambda: F.embedding_bag(input=torch.tensor([[1]]), weight=V["x"]),
    "max_unpool": lambda: F.max_unpool1d(
        input=V["x"][None], indices=torch.tensor([[[0, 2, 4]] * 2]), kernel_size=2
    ),
    "F.layer_norm": lambda: F.layer_norm(input=V["x"], normalized_shape=[3], eps=1e-3),
    "layer_norm": lambda: torch.layer_norm(input=V["x"], normalized_shape=[3], cudnn_enable=False),
    "F.group_norm": lambda: F.group_norm(input=V["x"], num_groups=3),
    "group_norm": lambda: torch.group_norm(input=V["x"], num_groups=3, cudnn_enabled=False),
    "F.batch_norm": lambda: F.batch_norm(
        input=V["x"], running_mean=None, running_var=None, training=True
    ),
    "F.instance_norm": lambda: F.instance_norm(input=V["x"][None], use_input_stats=True),
    "F.rms_norm": lambda: F.rms_norm(input=V["x"], normalized_shape=[3], eps=1e-6),
    "rms_norm": lambda: torch.rms_norm(input=V["x"], normalized_shape=[3], eps=1e-6),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("order", [2, 3])
def test_what_is_written_out_takes_the_arguments_of_torch(name: str, order: int) -> None:
    """By their names as well, and `out`."""
    right = CALLS[name]()
    with RightDerivatives(order):
        torch.testing.assert_close(CALLS[name](), right)
