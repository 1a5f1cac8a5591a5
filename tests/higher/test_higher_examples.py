"""Code as it is written for `higher`: a MAML training, and a tutorial's figures."""

import warnings
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metarun.higher

with warnings.catch_warnings():  # its sources are older than these Python versions
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import higher

F64 = torch.float64


def few_shot_training(api: ModuleType) -> dict[str, Any]:
    """MAML on images: batches of tasks, second order, an outer Adam, then adaptation at test."""
    torch.manual_seed(1)
    blocks = []
    for channels in (1, 8):
        blocks += [nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8, momentum=1, affine=True)]
        blocks += [nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8, 3)).double()
    outer_optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    log = []
    for _ in range(2):
        net.train()
        inner_optimizer = torch.optim.SGD(net.parameters(), lr=1e-1)
        outer_optimizer.zero_grad()
        for _task in range(3):
            support, query = torch.randn(2, 6, 1, 10, 10, dtype=F64)
            labels = torch.arange(6) % 3
            with api.innerloop_ctx(net, inner_optimizer, copy_initial_weights=False) as (
                fnet,
                diffopt,
            ):
                for _ in range(3):
                    diffopt.step(F.cross_entropy(fnet(support), labels))
                logits = fnet(query)
                loss = F.cross_entropy(logits, labels)
                log += [loss.detach(), (logits.argmax(1) == labels).sum()]
                loss.backward()
        outer_optimizer.step()
    net.train()
    inner_optimizer = torch.optim.SGD(net.parameters(), lr=1e-1)
    with api.innerloop_ctx(net, inner_optimizer, track_higher_grads=False) as (fnet, diffopt):
        for _ in range(3):
            diffopt.step(F.cross_entropy(fnet(support), labels))
        log.append(F.cross_entropy(fnet(query), labels).detach())
    return {"log": log, "state": dict(net.state_dict())}


def test_the_maml_example_trains_the_same() -> None:
    ours, theirs = few_shot_training(metarun.higher), few_shot_training(higher)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert ours["state"]["1.running_mean"].abs().sum() == 0, "the model's own statistics moved"


def tutorial(copy: bool, w0: float | None = None) -> dict[str, Any]:
    """Learning y = 3.5 x with a learned learning rate and momentum.

    Args:
        copy: `copy_initial_weights`.
        w0: the initial weight; as initialised by torch, if None.
    """
    numpy.random.seed(1)
    torch.manual_seed(3)
    x = torch.tensor(numpy.random.random((100, 1)), dtype=F64)
    y = 3.5 * x
    model = nn.Linear(1, 1, bias=False).double()
    if w0 is not None:
        nn.init.constant_(model.weight, w0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.1)
    lr = torch.tensor([0.3], requires_grad=True)
    momentum = torch.tensor([0.5], requires_grad=True)
    override = {"lr": lr, "momentum": momentum}
    with metarun.higher.innerloop_ctx(
        model, optimizer, copy_initial_weights=copy, override=override
    ) as (fmodel, diffopt):
        for _ in range(5):
            diffopt.step((fmodel(x) - y).pow(2).mean())
        weights = [next(fmodel.parameters(time=t)).item() for t in range(6)]
        loss = (fmodel.weight - 3.5).pow(2).sum()
        loss.backward()
    return {
        "loss": loss.item(),
        "lr": lr.grad.item(),
        "momentum": momentum.grad.item(),
        "w0": None if model.weight.grad is None else model.weight.grad.item(),
        "weights": weights,
    }


@pytest.mark.parametrize("copy", [True, False])
def test_the_tutorial_prints_its_figures(copy: bool) -> None:
    found = tutorial(copy)
    assert found["loss"] == pytest.approx(0.011927987982895929, rel=1e-12)
    assert f"{found['lr']:.4f}" == "-1.6295"
    assert f"{found['momentum']:.4f}" == "-0.9496"
    assert [f"{w:.4f}" for w in found["weights"]] == (
        ["-0.9915", "-0.1217", "1.0145", "2.0640", "2.8668", "3.3908"]
    )
    assert found["w0"] is None if copy else f"{found['w0']:.4f}" == "-0.0053"


def test_the_tutorials_meta_gradient_says_how_the_loss_changes() -> None:
    before = tutorial(copy=False)
    after = tutorial(copy=False, w0=before["weights"][0] + 1e-5)
    assert f"{before['w0']:.6f}" == "-0.005311"
    assert f"{(after['loss'] - before['loss']) / 1e-5:.6f}" == "-0.005311"
