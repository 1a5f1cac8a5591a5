"""Different optimizers for different parameters of one inner loop."""

import pytest
import torch
from torch import Tensor

from metarun.unroll import adam, learn_hyper, mixed, newton, partition, sgd, unroll

F64 = torch.float64


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"body.weight": (3, 4), "body.bias": (3,), "head.weight": (2, 3), "head.bias": (2,)}
    return {
        name: torch.randn(shape, dtype=F64, generator=generator) for name, shape in shapes.items()
    }


INPUTS = torch.randn(8, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(2))


def loss_of(params: dict[str, Tensor], step: int = 0) -> Tensor:
    features = (INPUTS @ params["body.weight"].T + params["body.bias"]).tanh()
    outputs = features @ params["head.weight"].T + params["head.bias"]
    return (outputs - TARGETS).pow(2).mean()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def test_first_order_parts_are_a_partition() -> None:
    parts = [(["head.*"], adam(0.1)), (["body.weight", "body.bias"], sgd(0.2, momentum=0.5))]
    ours = unroll(loss_of, start(), mixed(parts), 4)
    theirs = unroll(loss_of, start(), partition(parts), 4)
    assert_same(ours.params, theirs.params)
    assert mixed(parts).hyper == partition(parts).hyper


def test_a_part_may_be_one_pattern() -> None:
    for whole in (mixed, partition):
        patterns = whole([("head.*", adam(0.1)), ("body.*", sgd(0.2))])
        lists = whole([(["head.*"], adam(0.1)), (["body.*"], sgd(0.2))])
        moved, expected = (unroll(loss_of, start(), o, 2).params for o in (patterns, lists))
        assert_same(moved, expected)


def test_all_parts_move_by_the_derivatives_at_the_same_point() -> None:
    both = mixed([("body.*", sgd(0.3)), ("head.*", newton(joint=True))])
    moved = unroll(loss_of, start(), both, 1).params
    head = {name: p for name, p in start().items() if name.startswith("head.")}
    alone = unroll(lambda p, _: loss_of(start() | p), head, newton(joint=True), 1).params
    descended = unroll(loss_of, start(), sgd(0.3), 1).params
    assert_same(moved, {n: alone[n] if n in alone else descended[n] for n in start()})


def test_the_head_fits_while_the_body_learns() -> None:
    both = mixed([("body.*", sgd(0.1)), ("head.*", newton(0.3, joint=True))])
    losses = unroll(loss_of, start(), both, 30).losses
    assert (losses.diff() < 0).all() and losses[-1] < 0.2 * losses[0]
    assert losses[-1] < 0.8 * unroll(loss_of, start(), sgd(0.1), 30).losses[-1]


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint"])
def test_derivatives_with_respect_to_start_and_hyperparameters(gradient) -> None:
    names = list(start())

    def after(lr: Tensor, radius: Tensor, *values: Tensor) -> Tensor:
        hyper = {"0.lr": lr, "1.trust_radius": radius}
        optimizer = mixed([("body.*", sgd()), ("head.*", newton(joint=True))])
        params = dict(zip(names, values, strict=True))
        fast = unroll(
            loss_of, params, optimizer, 2, hyper={**optimizer.hyper, **hyper}, gradient=gradient
        ).params
        return loss_of(fast)

    inputs = [torch.tensor(0.2, dtype=F64), torch.tensor(0.3, dtype=F64), *start().values()]
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(after, inputs)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(after(*inputs), inputs))


def test_first_order_keeps_the_derivatives_of_the_hyperparameters() -> None:
    """The gradients and Hessians are constants; learning rate and radius are not."""
    leaves = {name: p.requires_grad_() for name, p in start().items()}
    lr = torch.tensor(0.2, dtype=F64, requires_grad=True)
    radius = torch.tensor(0.3, dtype=F64, requires_grad=True)
    optimizer = mixed([("body.*", sgd(lr)), ("head.*", newton(radius, joint=True))])
    fast = unroll(loss_of, leaves, optimizer, 1, gradient="first_order").params
    wrt = [lr, radius, *leaves.values()]
    by_lr, by_radius, *by_start = torch.autograd.grad(sum(p.sum() for p in fast.values()), wrt)
    gradient = torch.func.grad(loss_of)(start())
    expected = -sum(gradient[name].sum() for name in gradient if name.startswith("body."))
    torch.testing.assert_close(by_lr, expected)
    assert by_radius != 0
    for found in by_start:
        assert torch.equal(found, torch.ones_like(found))


def test_hyperparameters_may_be_given_for_all_parameters_of_the_inner_loop() -> None:
    optimizer = mixed([("body.*", adam(0.1)), ("head.*", newton(0.4, joint=True))])
    learned = learn_hyper(optimizer.hyper, ["0.lr", "1.trust_radius"], "step", start(), 3)
    moved = unroll(
        loss_of, start(), optimizer, 3, hyper=lambda step: learned.at(learned.initial, step)
    )
    assert_same(moved.params, unroll(loss_of, start(), optimizer, 3).params)


def test_a_part_may_be_mixed_itself() -> None:
    inner = mixed([("head.weight", newton()), ("head.bias", sgd(0.1))])
    nested = mixed([("head.*", inner), ("body.*", sgd(0.1))])
    flat = mixed([("head.weight", newton()), (["head.bias", "body.*"], sgd(0.1))])
    assert {"0.0.trust_radius", "0.1.lr", "1.lr"} < set(nested.hyper)
    assert_same(
        unroll(loss_of, start(), nested, 2).params, unroll(loss_of, start(), flat, 2).params
    )


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        (["body.*", "*"], "body.weight belongs to part 0 and to part 1"),
        (["head.*", "body.weight"], "matches body.bias"),
        (["head.*", ["body.*", "tail.*"]], "no parameter matches 'tail"),
        ([[], "*"], "part 0 claims no parameters"),
        (["*", ["body.*", "*"]], r"\* belongs to part 0 and to part 1"),
    ],
)
def test_each_parameter_belongs_to_one_part(claims, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed([(claim, sgd()) for claim in claims]).init(start())
