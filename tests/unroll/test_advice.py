"""What torch cannot do in an unroll ends in our words, with torch's behind them."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metarun.higher as higher
from metarun.errors import explain
from metarun.unroll import Checkpoint, Truncated, meta_gradient, multi, newton, sgd, unroll
from metarun.unroll.advice import UnsuitableModel

# torch's own, of slow paths, and ours of mixed mode that falls back: not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

F64 = torch.float64
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
BAGS = torch.tensor([[0, 1], [2, 3], [3, 0]])
TASKS = torch.randn(2, 6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


class Then(nn.Module):
    """A linear layer, and a function of it and the layers beside it that gives the loss."""

    def __init__(self, loss: Callable[[Tensor, Any], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(4, 4), loss
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.linear(x), self)


def bags(mode: str, sparse: bool = False) -> nn.Module:
    bag = nn.EmbeddingBag(4, 4, mode=mode, sparse=sparse)
    return Then(lambda out, m: m.bag(BAGS).pow(2).mean() * out.mean(), bag=bag)


def ctc(out: Tensor, m: Any) -> Tensor:
    target, lengths = torch.tensor([[1, 2]]), (torch.tensor([6]), torch.tensor([2]))
    return F.ctc_loss(out.log_softmax(-1)[:, None], target, *lengths)


ONCE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "embedding bag": (lambda: bags("sum"), "embedding_bag.*nn.Embedding"),
    "embedding bag, mean": (lambda: bags("mean"), "embedding_bag.*nn.Embedding"),
    "embedding bag, max": (lambda: bags("max"), "embedding_bag.*nn.Embedding"),
    "ctc": (lambda: Then(ctc), "ctc_loss, which"),
    "hard sigmoid": (
        lambda: Then(lambda out, m: F.hardsigmoid(out).mean()),
        r"hardsigmoid.*\(x / 6 \+ 0.5\)",
    ),
    "multi margin": (
        lambda: Then(lambda out, m: F.multi_margin_loss(out, LABELS)),
        r"multi_margin_loss.*clamp\(min=0\)",
    ),
    "multilabel margin": (
        lambda: Then(lambda out, m: F.multilabel_margin_loss(out, LABELS[:, None].expand(6, 4))),
        "multilabel_margin_loss.*multilabel_soft_margin_loss",
    ),
    "segments": (
        lambda: Then(
            lambda out, m: (
                torch.segment_reduce(out, "mean", lengths=torch.tensor([2, 4])).pow(2).mean()
            )
        ),
        "segment_reduce.*index_add",
    ),
}
"""Modules that torch can differentiate once -> what the message says."""


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda p, step, x: functional_call(model, p, (x,))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def meta(model: nn.Module, gradient: Any, batching: Any, optimizer: Any = None) -> Any:
    loss = loss_of(model)

    def task_loss(meta: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        end = unroll(loss, dict(meta), optimizer or sgd(0.1), 2, context=x, gradient=gradient)
        return loss(end.params, 0, x.cos()), end.losses

    start = {name: p.detach() for name, p in weights(model).items()}
    return meta_gradient(task_loss, start, TASKS.to(next(iter(start.values()))), batching)


def advised(message: str) -> Any:
    """Our words, then torch's; a command says the same."""
    return pytest.raises(UnsuitableModel, match=rf"(?s){message}.*first_order.*\(torch: ")


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed", "implicit"])
@pytest.mark.parametrize("name", ONCE)
def test_a_missing_second_derivative_is_named(name: str, gradient: Any, batching: Any) -> None:
    make, message = ONCE[name]
    with advised(message) as refusal:
        meta(make().double(), gradient, batching)
    assert explain(refusal.value) == (str(refusal.value), 1)


@pytest.mark.parametrize("gradient", ["reverse", Truncated(1)], ids=str)
@pytest.mark.parametrize("name", ONCE)
def test_it_is_named_before_a_backward_pass_of_ones_own(name: str, gradient: Any) -> None:
    make, message = ONCE[name]
    model = make().double()
    for _ in range(2):  # not the first time only
        with advised(message):
            unroll(loss_of(model), weights(model), sgd(0.1), 2, context=TASKS[0], gradient=gradient)


@pytest.mark.parametrize("gradient", ["checkpoint", Checkpoint(2), "mixed", "implicit"], ids=str)
@pytest.mark.parametrize("name", ONCE)
def test_it_is_named_in_a_backward_pass_of_ones_own(name: str, gradient: Any) -> None:
    make, message = ONCE[name]
    model = make().double()
    params = weights(model)
    end = unroll(loss_of(model), params, sgd(0.1), 2, context=TASKS[0], gradient=gradient)
    with advised(message):
        loss_of(model)(end.params, 0, TASKS[1]).backward()


@pytest.mark.parametrize("name", ONCE)
def test_newton_names_it_too(name: str) -> None:
    make, message = ONCE[name]
    with advised(message):
        meta(make().double(), "reverse", "loop", newton(damping=1.0))


def test_the_drop_in_names_it_also_after_a_model_of_the_same_shapes() -> None:
    """What was found of one model says nothing of another."""
    for kind in (nn.Hardsigmoid, nn.Tanh, nn.Hardsigmoid):
        net = nn.Sequential(nn.Linear(2, 4), kind(), nn.Linear(4, 1))
        opt = torch.optim.SGD(net.parameters(), 0.1)
        with higher.innerloop_ctx(net, opt) as (fnet, diffopt):
            loss = fnet(torch.ones(3, 2)).pow(2).mean()
            if kind is nn.Tanh:
                diffopt.step(loss)
            else:
                with advised("hardsigmoid"):
                    diffopt.step(loss)


@pytest.mark.parametrize("name", ONCE)
def test_a_step_on_a_loss_that_is_there_names_it_too(name: str) -> None:
    make, message = ONCE[name]
    model = make().double()
    params = weights(model)
    loss = loss_of(model)(params, 0, TASKS[0])
    with advised(message):
        multi.Newton(damping=1.0).get_step(loss, params)


@pytest.mark.parametrize("name", ONCE)
def test_the_drop_in_names_it_and_works_in_first_order_as_it_says(name: str) -> None:
    make, message = ONCE[name]
    model = make().double()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt), advised(message):
        diffopt.step(fmodel(TASKS[0]))
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(fmodel(TASKS[0]), grad_callback=lambda grads: [g.detach() for g in grads])
        found = torch.autograd.grad(fmodel(TASKS[1]), list(model.parameters()))
    params = weights(model)
    end = unroll(loss_of(model), params, sgd(0.1), 2, context=TASKS[0], gradient="first_order")
    expected = torch.autograd.grad(loss_of(model)(end.params, 0, TASKS[1]), list(params.values()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("name", ONCE)
def test_first_order_works_as_the_message_says(name: str, batching: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: no batching rule
        grads, _ = meta(ONCE[name][0]().double(), "first_order", batching)
    assert all(g.isfinite().all() for g in grads.values())


def test_the_same_formulas_written_out_work_as_the_message_says() -> None:
    x = torch.linspace(-4, 4, 9, dtype=F64)
    torch.testing.assert_close((x / 6 + 0.5).clamp(0, 1), F.hardsigmoid(x))
    out, y = TASKS[0], LABELS
    margins = (1 - out.gather(1, y[:, None]) + out).clamp(min=0)
    others = margins.scatter(1, y[:, None], 0.0).sum() / out.numel()
    torch.testing.assert_close(others, F.multi_margin_loss(out, y))


# ---------------------------------------------------------------- other causes


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, None])[0].pow(2).mean()


def of(fn: Callable[[Tensor], Tensor]) -> nn.Module:
    return Then(lambda out, m: fn(out).mean())


def written(x: Tensor) -> Tensor:
    h = torch.zeros(6, 4, dtype=x.dtype)
    h[:] = x
    return h


def embedding(**options: Any) -> nn.Module:
    return Then(
        lambda out, m: m.e(BAGS).pow(2).mean() * out.mean(), e=nn.Embedding(4, 4, **options)
    )


def filled(x: Tensor) -> Tensor:
    return x * torch.empty(6, 4, dtype=x.dtype).bernoulli_(0.5)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "sparse embedding, vmap": (lambda: embedding(sparse=True), "reverse", "vmap", "sparse=False"),
    "sparse embedding, mixed": (lambda: embedding(sparse=True), "mixed", "loop", "sparse=False"),
    "sparse bag, mixed": (lambda: bags("sum", sparse=True), "mixed", "loop", "sparse=False"),
    "lstm": (Recurrent, "reverse", "vmap", "batching='loop'"),
    "written": (lambda: of(written), "reverse", "vmap", "x.new_zeros"),
    "written, mixed": (lambda: of(written), "mixed", "vmap", "x.new_zeros"),
    "mask": (lambda: of(lambda x: x[x > 0]), "reverse", "vmap", "torch.where"),
    "mask, mixed": (lambda: of(lambda x: x.masked_select(x > 0)), "mixed", "vmap", "torch.where"),
    "unique": (lambda: of(lambda x: x * x.argmax(-1).unique().numel()), "reverse", "vmap", "loop"),
    "one hot": (lambda: of(lambda x: F.one_hot(x.argmax(-1), 4) * x), "mixed", "vmap", "one_hot"),
    "rrelu": (lambda: of(lambda x: F.rrelu(x, training=True)), "reverse", "vmap", "loop"),
    "filled": (lambda: of(filled), "reverse", "vmap", "torch.rand_like"),
    "numpy": (lambda: of(lambda x: x * float(x.detach().numpy().sum())), "mixed", "loop", "leaves"),
    "leaf": (lambda: of(lambda x: x.detach().requires_grad_() * x), "mixed", "loop", "func.grad"),
    "ldl": (lambda: of(lambda x: torch.linalg.ldl_factor(x.T @ x)[0]), "reverse", "loop", "eigh"),
    "dirichlet": (
        lambda: of(lambda x: torch.distributions.Dirichlet(x.exp()).rsample()),
        "mixed",
        "vmap",
        "setup_context",
    ),
    "nested": (
        lambda: of(lambda x: torch.nested.as_nested_tensor([x[:2], x[2:]]).to_padded_tensor(0.0)),
        "reverse",
        "loop",
        "pad",
    ),
    "statistics, mixed": (
        lambda: Then(lambda out, m: m.n(out).pow(3).mean(), n=nn.BatchNorm1d(4)),
        "mixed",
        "vmap",
        "track_running_stats=False",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_torch_cannot_do_is_explained(name: str) -> None:
    make, gradient, batching, message = OTHERS[name]
    with pytest.raises(UnsuitableModel, match=rf"(?s){message}.*\(torch: "):
        meta(make().double(), gradient, batching)


@pytest.mark.parametrize("gradient", ["reverse", "first_order", "checkpoint", "mixed"])
def test_a_loss_that_writes_on_its_parameters_is_refused(gradient: Any) -> None:
    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        with torch.no_grad():
            params["w"].mul_(3)
        return (params["w"] ** 2).sum()

    start = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(UnsuitableModel, match=r"writes on the parameter w|gives another value"):
        unroll(loss, start, sgd(0.1), 2, gradient=gradient)


@pytest.mark.parametrize("gradient", ["reverse", "first_order", "checkpoint", "mixed"])
def test_an_embedding_that_shortens_its_rows_is_refused(gradient: Any) -> None:
    model = embedding(max_norm=1.0).double()
    with torch.no_grad():
        model.get_submodule("e").weight.mul_(3)
    with pytest.raises((UnsuitableModel, ValueError), match="embedding with max_norm"):
        unroll(loss_of(model), weights(model), sgd(0.1), 2, context=TASKS[0], gradient=gradient)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is without oneDNN")
def test_the_lstm_of_float32_is_explained_and_works_as_the_message_says() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    with pytest.raises(UnsuitableModel, match=r"torch\.backends\.mkldnn\.enabled = False"):
        meta(model, "checkpoint", "loop")
    with torch.backends.mkldnn.flags(enabled=False):
        ours = meta(model, "checkpoint", "loop")[0]
    torch.testing.assert_close(ours, meta(model, "reverse", "loop")[0])


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("gradient", ["checkpoint", "mixed", "implicit", "evolution"])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: F.gumbel_softmax(x),
        lambda x: torch.func.grad(lambda z: z.pow(3).sum())(x),
        lambda x: torch.func.vmap(lambda z: z.sin())(x),
        lambda x: torch.func.jacrev(lambda z: z.pow(3))(x[0]),
    ],
    ids=["gumbel", "grad", "vmap", "jacrev"],
)
def test_the_check_of_what_a_loss_closes_over_refuses_none_that_works(
    fn: Any, gradient: Any, batching: Any
) -> None:
    meta(of(fn).double(), gradient, batching)


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed", "implicit", Checkpoint(2)], ids=str)
def test_a_loss_may_take_derivatives_itself(gradient: Any) -> None:
    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        out = torch.tanh(TASKS[0] @ p["w"])
        slope = torch.autograd.grad(out.sum(), p["w"], create_graph=True)[0]
        return (out.pow(2).mean() + slope.pow(2).sum()) / 10

    def run(mode: Any) -> Tensor:
        w = torch.ones(4, dtype=F64, requires_grad=True)
        end = unroll(loss, {"w": w}, sgd(0.1), 3, gradient=mode)
        return torch.autograd.grad(end.params["w"].sin().sum(), w)[0]

    if gradient == "implicit":
        assert run(gradient).isfinite().all()
    else:
        torch.testing.assert_close(run(gradient), run("reverse"), rtol=1e-10, atol=1e-12)


def test_such_a_loss_may_not_close_over_what_needs_a_gradient() -> None:
    scale = torch.ones(4, dtype=F64, requires_grad=True)

    def loss(p: dict[str, Tensor], step: int) -> Tensor:
        out = torch.tanh(TASKS[0] @ p["w"])
        slope = torch.autograd.grad(out.sum(), p["w"], create_graph=True)[0]
        return (scale * slope).pow(2).sum()

    with pytest.raises(ValueError, match=r"shape \(4,\).*context="):
        unroll(loss, {"w": torch.ones(4, dtype=F64)}, sgd(0.1), 2, gradient="checkpoint")
