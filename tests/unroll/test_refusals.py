"""What cannot be unrolled is refused, or works all the same, and says so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from metarun.errors import explain
from metarun.unroll import Checkpoint, Truncated, adam, meta_gradient, newton, sgd, unroll
from metarun.unroll.advice import UnsuitableModel
from tests.unroll.test_gradients import relative_difference

F64 = torch.float64
RECOMPUTING = ["checkpoint", "mixed", "implicit", "evolution", Checkpoint(2)]


def square(params: dict[str, Tensor], step: int) -> Tensor:
    return params["w"].pow(2).sum()


@pytest.mark.parametrize("gradient", ["reverse", "first_order", *RECOMPUTING], ids=str)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, step: p["w"], r"must be a scalar tensor, not \(2,\): take its mean"),
        (lambda p, step: 1.0, "must be a scalar tensor, not float"),
        (lambda p, step: torch.ones(()), "does not depend on the parameters"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, message: str, gradient: Any) -> None:
    with pytest.raises(ValueError, match=message):
        unroll(loss, {"w": torch.ones(2)}, sgd(0.1), 2, gradient=gradient)


def test_a_module_called_without_its_parameters_is_named_as_the_reason() -> None:
    model = nn.Linear(3, 1)
    params = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"functional_call\(model, params"):
        unroll(lambda p, step: model(torch.ones(2, 3)).mean(), params, sgd(0.1), 1)


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters to adapt"):
        unroll(square, {}, sgd(0.1), 1)


def test_parameters_of_another_model_are_refused() -> None:
    other = {"elsewhere.weight": torch.ones(1, 3)}
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="has no elsewhere: params must be named"):
        unroll(lambda p, s: functional_call(model, p, (torch.ones(2, 3),)).mean(), other, sgd(), 1)


# ---------------------------------------------------------------- tensors from outside


@pytest.mark.parametrize("gradient", RECOMPUTING, ids=str)
def test_a_closed_over_tensor_whose_gradient_would_be_lost_is_refused(gradient: Any) -> None:
    phi = torch.ones(2, requires_grad=True)
    doubled = 2 * phi

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        return (params["w"] * doubled).pow(2).sum()

    with pytest.raises(ValueError, match=r"shape \(2,\).*context="):
        unroll(loss, {"w": torch.ones(2)}, sgd(0.1), 2, gradient=gradient)
    with torch.no_grad():  # no gradient, nothing to lose
        if gradient != "implicit":
            unroll(loss, {"w": torch.ones(2)}, sgd(0.1), 2, gradient=gradient)
    with pytest.raises(ValueError, match=r"shape \(2,\).*context="):
        grad(lambda t: through(lambda p, s: (p["w"] * t).pow(2).sum(), gradient))(torch.ones(2))


def through(loss: Any, gradient: Any) -> Tensor:
    return unroll(loss, {"w": torch.ones(2)}, sgd(0.1), 2, gradient=gradient).params["w"].sum()


@pytest.mark.parametrize("gradient", RECOMPUTING, ids=str)
def test_a_closed_over_tensor_that_is_mapped_is_refused(gradient: Any) -> None:
    def task(x: Tensor) -> Tensor:
        return through(lambda p, s: (p["w"] * x).pow(2).sum(), gradient)

    with pytest.raises(ValueError, match=r"mapped over tasks.*context="):
        vmap(task, randomness="different")(torch.ones(3, 2))


@pytest.mark.parametrize("gradient", RECOMPUTING, ids=str)
def test_constants_may_be_closed_over(gradient: Any) -> None:
    constant, learned = torch.tensor([1.0, 2.0]), torch.ones(2, requires_grad=True)

    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        return (params["w"] * constant * learned.detach()).pow(2).sum() * learned.shape[0]

    w = torch.ones(2, requires_grad=True)
    end = unroll(loss, {"w": w}, sgd(0.1), 2, gradient=gradient)
    assert torch.autograd.grad(end.params["w"].sum(), w)[0].all()


# ---------------------------------------------------------------- random state


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed", Checkpoint(2)], ids=str)
def test_recomputing_leaves_the_random_state_as_it_was(gradient: Any) -> None:
    def run(mode: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        w = torch.ones(8, requires_grad=True)
        end = unroll(
            lambda p, s: nn.functional.dropout(p["w"]).pow(2).sum(),
            {"w": w},
            sgd(0.1),
            4,
            gradient=mode,
        )
        before_backward = torch.get_rng_state()
        end.params["w"].sum().backward()
        assert torch.equal(torch.get_rng_state(), before_backward)
        return torch.rand(3), w.grad

    for ours, expected in zip(run(gradient), run("reverse"), strict=True):
        torch.testing.assert_close(ours, expected)


# ---------------------------------------------------------------- operations without forward mode

X = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
Y = X.sin() @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=F64)
WITHOUT_FORWARD_MODE = {
    "huber_loss": nn.functional.huber_loss,
    "mse_loss": nn.functional.mse_loss,
    "soft_margin_loss": lambda out, y: nn.functional.soft_margin_loss(out, y.sign()),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("name", WITHOUT_FORWARD_MODE)
def test_mixed_mode_falls_back_loudly_and_stays_exact(name: str, batching: Any) -> None:
    criterion = WITHOUT_FORWARD_MODE[name]

    def gradient(mode: Any) -> Any:
        def task_loss(meta: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            def loss(p: dict[str, Tensor], step: int, y: Tensor) -> Tensor:
                return criterion(torch.tanh(X @ p["w"]), y)

            end = unroll(loss, dict(meta), sgd(0.1), 3, context=y, gradient=mode)
            return loss(end.params, 0, y + 1), end.losses

        meta = {"w": torch.full((3, 1), 0.3, dtype=F64)}
        return meta_gradient(task_loss, meta, torch.stack([Y, 2 * Y]), batching)[0]

    with pytest.warns(UserWarning, match=f"falls back to 'checkpoint'.*{name}"):
        ours = gradient("mixed")
    assert relative_difference(ours, gradient("reverse")) < 1e-10


# ---------------------------------------------------------------- modules


def unrolled_gradient(model: nn.Module, x: Tensor, gradient: Any, batching: Any) -> Any:
    meta = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], step: int, x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).pow(2).mean()

    def task_loss(meta: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        end = unroll(loss, dict(meta), sgd(0.1), 2, context=x, gradient=gradient)
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
            return loss(end.params, 0, x.cos()), end.losses

    return meta_gradient(task_loss, meta, x, batching)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer = kind(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Itself(nn.Module):
    def __init__(self, through: Any) -> None:
        super().__init__()
        self.layer, self.through = nn.Linear(4, 4), through

    def forward(self, x: Tensor) -> Tensor:
        return self.through(self.layer, x)


SEQUENCES = torch.randn(2, 5, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed"])
def test_attention_has_second_derivatives(gradient: str) -> None:
    """The fused kernels have none; the unroll chooses the one that has."""
    exact = unrolled_gradient(attention(), SEQUENCES, "reverse", "loop")
    for batching in ("loop", "vmap"):
        ours = unrolled_gradient(attention(), SEQUENCES, gradient, batching)
        assert relative_difference(ours, exact) < 1e-10


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_work_in_a_loop(kind: Any) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind).double()
    exact = unrolled_gradient(model, SEQUENCES, "reverse", "loop")
    for gradient in ("checkpoint", "mixed"):
        ours = unrolled_gradient(model, SEQUENCES, gradient, "loop")
        assert relative_difference(ours, exact) < 1e-10


@pytest.mark.parametrize(
    ("model", "batching", "advice"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), "loop", "track_running_stats=False"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), "vmap", "track_running_stats=False"),
        (Itself(lambda f, x: f(x) * f(x).mean().item()), "vmap", "Python number"),
        (Itself(lambda f, x: f(x) if f(x).mean() > 0 else x), "vmap", "Python number"),
        (Recurrent(nn.GRU), "vmap", "batching='loop'"),
        (Itself(lambda f, x: checkpoint(f, x, use_reentrant=False)), "loop", "checkpoints its own"),
        (Itself(lambda f, x: checkpoint(f, x, use_reentrant=True)), "loop", "checkpoints its own"),
    ],
    ids=["batch norm", "batch norm vmap", "item", "if", "gru", "checkpoint", "reentrant"],
)
def test_a_module_that_cannot_be_unrolled_is_refused_with_advice(
    model: nn.Module, batching: Any, advice: str
) -> None:
    with pytest.raises(UnsuitableModel, match=advice) as refusal:
        unrolled_gradient(model.double(), SEQUENCES, "reverse", batching)
    assert explain(refusal.value) == (str(refusal.value), 1), "a command says the same"


def test_random_numbers_under_a_plain_vmap_are_refused_with_advice() -> None:
    def task(x: Tensor) -> Tensor:
        return unroll(
            lambda p, s: nn.functional.dropout(p["w"] * x).sum(), {"w": torch.ones(2)}, sgd(0.1), 1
        ).params["w"]

    with pytest.raises(RuntimeError, match="randomness='different'"):
        vmap(task)(torch.ones(3, 2))


def test_mixed_mode_needs_a_gradient_driven_optimizer() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="choose gradient='checkpoint'"):
        unroll(square, {"w": w}, newton(), 1, gradient="mixed")


@pytest.mark.parametrize("gradient", ["checkpoint", Checkpoint(2)], ids=str)
def test_newton_steps_can_be_recomputed(gradient: Any) -> None:
    def result(mode: Any) -> Tensor:
        w = torch.tensor([0.3, 1.0], dtype=F64, requires_grad=True)
        loss = lambda p, s: (p["w"].pow(4) + p["w"].exp()).sum()  # noqa: E731
        end = unroll(loss, {"w": w}, newton(trust_radius=0.2), 3, gradient=mode)
        return torch.autograd.grad(end.params["w"].pow(2).sum(), w)[0]

    torch.testing.assert_close(result(gradient), result("reverse"), rtol=1e-10, atol=0)


@pytest.mark.parametrize("gradient", [Checkpoint(2), "evolution"], ids=str)
def test_observe_is_refused_where_steps_are_only_recomputed(gradient: Any) -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="observe"):
        unroll(square, {"w": w}, sgd(), 2, gradient=gradient, observe=lambda p: p["w"])


# ---------------------------------------------------------------- memory


def remembered_bytes(gradient: Any, steps: int, optimizer: Any) -> int:
    """Bytes of distinct storages that the graph of an unroll keeps, the fast weights included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten()
    )
    meta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    x = torch.rand(16, 1, 12, 12)
    end = unroll(
        lambda p, s, x: functional_call(model, p, (x,)).pow(2).mean(),
        meta,
        optimizer,
        steps,
        context=x,
        gradient=gradient,
    )
    kept = {}
    for node in graph([p.grad_fn for p in end.params.values()]):
        names = [name for name in dir(node) if name.startswith("_saved_")]
        for saved in [getattr(node, n) for n in names] + list(getattr(node, "saved_tensors", ())):
            for tensor in saved if isinstance(saved, list | tuple) else [saved]:
                if isinstance(tensor, Tensor):
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


def graph(todo: list[Any]) -> set[Any]:
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("gradient", ["mixed", "checkpoint"])
def test_recomputing_modes_remember_parameters_only(gradient: str, optimizer: Any) -> None:
    def growth(mode: Any) -> float:
        return (remembered_bytes(mode, 12, optimizer) - remembered_bytes(mode, 4, optimizer)) / 8

    parameters = 4 * (8 * 9 + 8 + 8 * 8 * 9 + 8)
    assert parameters <= growth(gradient) <= 12 * parameters
    assert growth(gradient) < 0.1 * growth("reverse")


def test_square_root_blocks_remember_less_than_every_step() -> None:
    optimizer = sgd(0.1, momentum=0.9)
    every = remembered_bytes("checkpoint", 49, optimizer)
    assert remembered_bytes(Checkpoint(None), 49, optimizer) < 0.4 * every


def test_a_loss_without_parameters_is_refused_for_newton_too() -> None:
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        unroll(lambda p, step: torch.ones(()), {"w": torch.ones(2)}, newton(), 2)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("gradient", [None, 3, Truncated, "backward"], ids=str)
def test_what_is_no_gradient_mode_is_refused(gradient: Any) -> None:
    with pytest.raises(ValueError, match="choose one of reverse, first_order"):
        unroll(square, {"w": torch.ones(2)}, sgd(0.1), 1, gradient=gradient)


def test_hyperparameters_must_be_the_optimizers() -> None:
    for hyper, wrong in (({**sgd().hyper, "LR": 3.0}, "LR"), ({"lr": 0.1}, "dampening, momentum")):
        with pytest.raises(ValueError, match=f"neither more nor less: see {wrong}"):
            unroll(square, {"w": torch.ones(2)}, sgd(), 1, hyper=hyper)


def test_hyperparameters_must_broadcast_to_the_parameters() -> None:
    hyper = {**sgd().hyper, "lr": torch.full((3, 1), 0.1)}
    with pytest.raises(ValueError, match=r"turn w from shape \(2,\) into \(3, 2\)"):
        unroll(square, {"w": torch.ones(2)}, sgd(), 1, hyper=hyper)


@pytest.mark.parametrize("gradient", RECOMPUTING, ids=str)
def test_a_closure_of_the_last_step_is_found_too(gradient: Any) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match="context="):
        unroll(
            lambda p, step: (p["w"] * (scale if step else 1.0)).pow(2).sum(),
            {"w": torch.ones(2)},
            sgd(0.1),
            2,
            gradient=gradient,
        )


@pytest.mark.parametrize("gradient", RECOMPUTING, ids=str)
def test_a_closure_of_the_optimizer_is_found_too(gradient: Any) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    plain = sgd(0.1)

    def update(grads: Any, state: Any, params: Any, hyper: Any) -> Any:
        return plain.update({n: scale * g for n, g in grads.items()}, state, params, hyper)

    with pytest.raises(ValueError, match="context="):
        unroll(square, {"w": torch.ones(2)}, plain._replace(update=update), 2, gradient=gradient)


class StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_custom_functions_without_a_forward_mode_fall_back_loudly_too() -> None:
    def gradient(mode: Any) -> Tensor:
        torch.manual_seed(0)
        w = torch.tensor([0.4, 1.3], dtype=F64, requires_grad=True)
        end = unroll(
            lambda p, s: nn.functional.dropout(StraightThrough.apply(p["w"]) * p["w"], 0.3).sum(),
            {"w": w},
            sgd(0.1),
            3,
            gradient=mode,
        )
        return torch.autograd.grad(end.params["w"].pow(2).sum(), w)[0]

    with pytest.warns(UserWarning, match=r"forward mode for a custom autograd\.Function"):
        ours = gradient("mixed")
    torch.testing.assert_close(ours, gradient("reverse"), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("steps", "size"), [(0, 1), (1, 1), (2, 1), (49, 7), (50, 7)])
def test_blocks_without_a_length_have_that_of_the_square_root(steps: int, size: int) -> None:
    assert Checkpoint(None).size(steps) == size and Checkpoint(3).size(steps) == 3
