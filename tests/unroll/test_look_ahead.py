"""Look-ahead loops: meta-updates while one inner problem goes on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.unroll import adam, look_ahead, sgd

F64 = torch.float64
SCALES = torch.tensor([1.0, 5.0], dtype=F64)


def inner_loss(params: dict[str, Tensor], step: int, meta: Any) -> Tensor:
    return (SCALES * meta["weights"] * (params["w"] - 0.1 * step).pow(2)).sum()


def meta_loss(params: dict[str, Tensor], meta: Any) -> Tensor:
    return (params["w"] - 2.0).pow(2).sum()


def start() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    meta = {
        "weights": torch.ones(2, dtype=F64, requires_grad=True),
        "lr": torch.tensor(0.05, dtype=F64, requires_grad=True),
    }
    return {"w": torch.tensor([1.0, -1.0], dtype=F64)}, meta


@pytest.mark.parametrize("gradient", ["reverse", "mixed", "checkpoint"])
def test_look_ahead_agrees_with_the_loop_written_out(gradient: Any) -> None:
    """An oracle in plain autograd: momentum SGD by hand, copies, and the real steps after."""
    params, meta = start()
    outer = torch.optim.SGD(list(meta.values()), lr=0.001)
    ours = list(
        look_ahead(
            inner_loss,
            params,
            sgd(momentum=0.5),
            meta,
            meta_loss,
            outer,
            updates=4,
            ahead=3,
            real=2,
            hyper=lambda m: {**sgd(momentum=0.5).hyper, "lr": m["lr"]},
            gradient=gradient,
        )
    )

    params, theirs = start()
    outer = torch.optim.SGD(list(theirs.values()), lr=0.001)
    w, buffer = params["w"], torch.zeros(2, dtype=F64)

    def walk(w: Tensor, buffer: Tensor, first: int, steps: int) -> tuple[Tensor, Tensor]:
        for step in range(first, first + steps):
            slope = 2 * SCALES * theirs["weights"] * (w - 0.1 * step)
            buffer = 0.5 * buffer + slope
            w = w - theirs["lr"] * buffer
        return w, buffer

    for update, state in enumerate(ours):
        looked, _ = walk(w, buffer, 2 * update, 3)
        outer.zero_grad()
        meta_loss({"w": looked}, theirs).backward()
        outer.step()
        w, buffer = (t.detach() for t in walk(w, buffer, 2 * update, 2))
        torch.testing.assert_close(state.params["w"], w, rtol=1e-12, atol=0)
        torch.testing.assert_close(state.state["w"].momentum, buffer, rtol=1e-12, atol=0)
        assert state.params["w"].grad_fn is None and not state.loss.requires_grad
    for name, value in meta.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=0)
    assert not torch.equal(meta["lr"], start()[1]["lr"])


def test_a_learning_rate_is_learned_while_the_model_trains() -> None:
    params, meta = start()
    meta["lr"].data.fill_(0.001)
    final = {}
    for learned in (False, True):
        given = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
        outer = torch.optim.Adam([given["lr"]], lr=0.01 if learned else 0.0)
        *_, last = look_ahead(
            lambda p, step, m: (SCALES * (p["w"] - 2.0).pow(2)).sum(),
            params,
            adam(),
            given,
            meta_loss,
            outer,
            updates=60,
            ahead=2,
            hyper=lambda m: {**adam().hyper, "lr": m["lr"]},
        )
        final[learned] = last.meta_loss
    assert final[True] < 0.05 * final[False]


def test_impossible_numbers_of_steps_are_refused() -> None:
    params, meta = start()
    outer = torch.optim.SGD(list(meta.values()), lr=0.1)
    with pytest.raises(ValueError, match="1 step or more"):
        next(look_ahead(inner_loss, params, sgd(), meta, meta_loss, outer, updates=1, ahead=0))


def test_a_meta_loss_that_learns_nothing_is_refused() -> None:
    meta = {"scale": torch.tensor(1.0, requires_grad=True)}
    rounds = look_ahead(
        lambda params, step, meta: params["w"].square().sum(),
        {"w": torch.ones(2)},
        sgd(0.1),
        meta,
        meta_loss=lambda params, meta: params["w"].square().sum(),
        meta_optimizer=torch.optim.SGD(meta.values(), lr=0.1),
        updates=1,
    )
    with pytest.raises(ValueError, match="does not depend on what is learned"):
        list(rounds)
