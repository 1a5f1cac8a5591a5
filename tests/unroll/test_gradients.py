"""Gradient modes: the exact ones equal "reverse", the others approach what they estimate."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.backbones.norm import BatchNorm
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
