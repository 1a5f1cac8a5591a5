"""Gradient modes: the exact ones equal "reverse", the others approach what they estimate."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from metarun.components.backbone.norm import BatchNorm
from metarun.unroll import (
    BlockLoss,
    Checkpoint,
    adam,
    meta_gradient,
    sgd,
    unroll,
)

F64 = torch.float64
EXACT = {
    "checkpoint": "checkpoint",
    "blocks of 2": Checkpoint(2),
    "blocks of sqrt": Checkpoint(None),
    "mixed": "mixed",
}
OPTIMIZERS = {
    "momentum": sgd(0.1, momentum=0.8, weight_decay=0.01),
    "adam": adam(0.05, beta1=0.8, beta2=0.9, eps=1e-4),
}


class Tied(nn.Module):
    """Two layers that share a weight, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.first(x.flatten(1))))
        return self.head(torch.tanh(self.second(x)))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    models = {
        "mlp": nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        "conv with batch norm": nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 4, 3, padding=1),
            BatchNorm(4),
            nn.ReLU(),
            nn.MaxPool2d(2, padding=1),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        "dropout": nn.Sequential(
            nn.Flatten(), nn.Linear(6, 16), nn.Dropout(0.4), nn.Tanh(), nn.Linear(16, 3)
        ),
        "tied and frozen": Tied(),
    }
    return {name: model.double() for name, model in models.items()}


NETWORKS = networks()


def tasks(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 9, 6, dtype=F64, generator=generator)
    return x, torch.randint(0, 3, (count, 9), generator=generator)


def problem(model: nn.Module, optimizer: Any, gradient: Any, steps: int = 5) -> tuple[Any, Any]:
    """A task loss in which every kind of meta-parameter takes part, and these."""
    meta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    weights = list(meta)
    meta |= {"lr": torch.tensor(0.1, dtype=F64), "temperature": torch.ones(3, dtype=F64)}

    def inner_loss(params: dict[str, Tensor], step: int, context: Any) -> Tensor:
        (x, y), temperature = context
        logits = functional_call(model, params, (x,))
        return nn.functional.cross_entropy((1 + 0.1 * step) * temperature * logits, y)

    def task_loss(meta: dict[str, Tensor], task: Any) -> tuple[Tensor, Tensor]:
        result = unroll(
            inner_loss,
            {name: meta[name] for name in weights},
            optimizer,
            steps,
            context=(task, meta["temperature"]),
            hyper={**optimizer.hyper, "lr": meta["lr"]},
            gradient=gradient,
        )
        x, y = task
        outer = nn.functional.cross_entropy(functional_call(model, result.params, (x + 1,)), y)
        return outer + 0.1 * result.losses.sum(), result.losses

    return task_loss, {name: value.requires_grad_() for name, value in meta.items()}


def of(model: nn.Module, optimizer: Any, gradient: Any, batching: str, **options: Any) -> Any:
    task_loss, meta = problem(model, optimizer, gradient, **options)
    torch.manual_seed(5)
    return meta_gradient(task_loss, meta, tasks(), batching)  # type: ignore[arg-type]


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a]).norm()
    return float(difference / torch.cat([b[k].flatten() for k in b]).norm())


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("gradient", EXACT.values(), ids=EXACT)
def test_exact_modes_equal_reverse(gradient, model, optimizer, batching: str) -> None:
    ours, losses = of(model, optimizer, gradient, batching)
    reverse, same_losses = of(model, optimizer, "reverse", batching)
    assert torch.equal(losses, same_losses)
    assert relative_difference(ours, reverse) < 1e-10
    assert all(grad.norm() > 0 for name, grad in ours.items() if ".1.bias" not in name)


def block_problem(model: nn.Sequential, optimizer: Any, gradient: Any, tokens: bool) -> Any:
    meta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    weights = list(meta)
    meta |= {"scale": torch.tensor(1.5, dtype=F64), "temperature": torch.ones(3, dtype=F64)}
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 4, (4, 9, 6), generator=generator)
    batch = (x if tokens else x.double().sin(), torch.randint(0, 3, (4, 9), generator=generator))

    loss_fn = BlockLoss(
        model,
        inputs=lambda context: context[0] if tokens else context[0] * context[2],
        loss=lambda out, context: nn.functional.cross_entropy(out * context[3], context[1]),
    )

    def task_loss(meta: dict[str, Tensor], task: Any) -> tuple[Tensor, Tensor]:
        context = (*task, meta["scale"], meta["temperature"])
        start = {name: meta[name] for name in weights}
        result = unroll(loss_fn, start, optimizer, 3, context=context, gradient=gradient)
        return loss_fn(result.params, context) + 0.1 * result.losses.sum(), result.losses

    for value in meta.values():
        value.requires_grad_()
    torch.manual_seed(5)
    return task_loss, meta, batch


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.body(self.norm(x)))


def block_networks() -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    models = {
        "residual with dropout": nn.Sequential(
            nn.Linear(6, 6), Residual(6), nn.Dropout(0.3), Residual(6), nn.Linear(6, 3)
        ),
        "tied and frozen": nn.Sequential(
            shared, nn.Tanh(), shared, nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)
        ),
        "tokens": nn.Sequential(
            nn.Embedding(4, 5), nn.Flatten(), nn.Dropout(0.2), nn.Tanh(), nn.Linear(30, 3)
        ),
    }
    return {name: model.double() for name, model in models.items()}


BLOCK_NETWORKS = block_networks()


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", BLOCK_NETWORKS)
@pytest.mark.parametrize("gradient", ["mixed", "checkpoint", "first_order"])
def test_block_losses_have_the_gradient_of_the_whole(name, optimizer, batching, gradient) -> None:
    model = BLOCK_NETWORKS[name]
    results = []
    for mode in (gradient, "first_order" if gradient == "first_order" else "reverse"):
        task_loss, meta, batch = block_problem(model, optimizer, mode, tokens=name == "tokens")
        results.append(meta_gradient(task_loss, meta, batch, batching))
    (ours, losses), (reverse, same_losses) = results
    torch.testing.assert_close(losses, same_losses, rtol=1e-13, atol=0)
    assert relative_difference(ours, reverse) < 1e-10


NORMS = {
    "layer": lambda: nn.LayerNorm(6),
    "batch": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten()),
    "group": lambda: nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_torchs_own_norms_have_right_second_derivatives_under_vmap(norm) -> None:
    """They would not, if the meta-gradient were taken around vmap (see `meta_gradient`)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), norm(), nn.Tanh(), nn.Linear(6, 3)).double()
    loop, _ = of(model, sgd(0.1), "reverse", "loop")
    mapped, _ = of(model, sgd(0.1), "reverse", "vmap")
    assert relative_difference(mapped, loop) < 1e-10


# ---------------------------------------------------------------- the same derivative, by any means


def gradient_of(loss: Any, gradient: Any, start: Tensor, **options: Any) -> Tensor:
    w = start.clone().requires_grad_()
    end = unroll(loss, {"w": w}, sgd(0.1), 3, gradient=gradient, **options)
    return torch.autograd.grad(end.params["w"].pow(2).sum(), w)[0]


START = torch.tensor([0.5, -0.3, 0.8], dtype=F64)


@pytest.mark.parametrize("gradient", EXACT.values(), ids=EXACT)
def test_what_a_loss_computes_without_gradients_is_a_constant_in_every_mode(gradient: Any) -> None:
    """A teacher or a pseudo-label: tangents would pass through no_grad, graphs do not."""

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        with torch.no_grad():
            target = params["w"].exp()
        return (params["w"] * target).pow(2).sum()

    exact = gradient_of(loss, "reverse", START)
    torch.testing.assert_close(gradient_of(loss, gradient, START), exact, rtol=1e-12, atol=0)


def test_forward_mode_stops_where_first_order_does() -> None:
    def end(w: Tensor) -> Tensor:
        unrolled = unroll(
            lambda p, step: p["w"].pow(4).sum(), {"w": w}, sgd(0.1), 2, gradient="first_order"
        )
        return unrolled.params["w"].pow(2).sum()

    direction = torch.tensor([1.0, 2.0, -0.5], dtype=F64)
    _, tangent = jvp(end, (START,), (direction,))
    torch.testing.assert_close(tangent, torch.func.grad(end)(START) @ direction)


@pytest.mark.parametrize("inner", ["reverse", "checkpoint", "mixed", "first_order"])
@pytest.mark.parametrize("gradient", EXACT.values(), ids=EXACT)
@pytest.mark.filterwarnings("ignore:gradient='mixed' falls back")
def test_unrolls_can_be_nested(gradient: Any, inner: Any) -> None:
    """An inner loop inside the loss of another."""

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        nested = unroll(
            lambda q, t, w: (q["b"] - w).pow(4).sum(),
            {"b": torch.zeros_like(params["w"])},
            sgd(0.1),
            2,
            context=params["w"],
            hyper={**sgd().hyper, "lr": 0.1 + params["w"].pow(2).mean()},
            gradient=inner,
        )
        return nested.params["b"].pow(2).sum() + params["w"].pow(4).sum()

    exact = gradient_of(loss, "reverse", START)
    torch.testing.assert_close(gradient_of(loss, gradient, START), exact, rtol=1e-10, atol=0)


def test_losses_may_use_derivatives_of_their_own() -> None:
    def penalised(params: dict[str, Tensor], step: int) -> Tensor:
        slope = torch.func.vjp(lambda w: w.pow(3).sum(), params["w"])[1](torch.ones((), dtype=F64))
        return params["w"].sin().sum() + slope[0].pow(2).sum()

    exact = gradient_of(penalised, "reverse", START)
    for gradient in EXACT.values():
        ours = gradient_of(penalised, gradient, START)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=0)


def test_recomputing_happens_under_the_autocast_of_the_forward_pass() -> None:
    seen = []

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        product = params["w"] @ torch.ones(3, 2)
        seen.append(product.dtype)
        return product.float().pow(2).sum()

    w = torch.ones(2, 3, requires_grad=True)
    for gradient in ("checkpoint", "mixed"):
        with torch.autocast("cpu", torch.bfloat16):
            end = unroll(loss, {"w": w}, sgd(0.01), 2, gradient=gradient)
        torch.autograd.grad(end.params["w"].sum(), w)
    assert set(seen) == {torch.bfloat16}


def test_third_derivatives_agree() -> None:
    def curvature(gradient: Any) -> Tensor:
        w = START.clone().requires_grad_()
        end = unroll(lambda p, s: p["w"].pow(4).sum(), {"w": w}, sgd(0.1), 2, gradient=gradient)
        (first,) = torch.autograd.grad(end.params["w"].sum(), w, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), w)[0]

    for gradient in EXACT.values():
        torch.testing.assert_close(curvature(gradient), curvature("reverse"), rtol=1e-10, atol=0)


def test_a_block_loss_takes_the_other_parameters_from_the_model_as_constants() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=F64)
    loss = BlockLoss(model, inputs=lambda c: c, loss=lambda out, c: out.pow(2).mean())
    head = {n: p for n, p in model.named_parameters() if n.startswith("2.")}
    grads = []
    for gradient in ("reverse", "checkpoint", "mixed"):
        end = unroll(loss, head, sgd(0.1), 3, context=x, gradient=gradient)
        grads.append(torch.autograd.grad(loss(end.params, x), list(head.values())))
    for ours in grads[1:]:
        for a, b in zip(ours, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for gradient in ("reverse", "mixed"):
        with pytest.raises(ValueError, match=r"no block has 2\.weigth"):
            unroll(loss, {"2.weigth": x}, sgd(0.1), 1, context=x, gradient=gradient)
        vector = BlockLoss(model, inputs=lambda c: c, loss=lambda out, c: out.sum(0))
        with pytest.raises(ValueError, match="must be a scalar"):
            unroll(vector, head, sgd(0.1), 1, context=x, gradient=gradient)


def test_block_losses_draw_random_inputs_again_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loss = BlockLoss(
        model,
        inputs=lambda c: nn.functional.dropout(c[0] * c[1]),
        loss=lambda out, c: out.pow(2).mean(),
    )
    x = torch.randn(4, 6, dtype=F64)
    results = []
    for gradient in ("reverse", "mixed"):
        torch.manual_seed(0)
        scale = torch.ones(6, dtype=F64, requires_grad=True)
        params = dict(model.named_parameters())
        end = unroll(loss, params, sgd(0.3), 3, context=(x, scale), gradient=gradient)
        results.append(torch.autograd.grad(end.losses.sum(), scale)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=0)
