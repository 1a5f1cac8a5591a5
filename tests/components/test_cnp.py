"""Conditional neural processes, against their formulas written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.cnp import cnp
from metarun.components.backbone.mlp import MLP
from metarun.errors import ConfigError
from metarun.training.setup import Setup
from metarun.unroll import sgd
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

SMALL = ("algo.encoder=[10,12]", "algo.decoder=[7]", "task.query=6")
ATTENTION = ("algo.attention=true", "algo.heads=4")
LATENT = ("algo.latent=3", "algo.samples=4")


def made(*own: str) -> tuple[Setup, dict[str, Tensor]]:
    setup = setup_of("algo=cnp", *SINE, *SMALL, *own)
    return setup, {name: value.detach() for name, value in stirred(setup).items()}


def dense(meta: dict[str, Tensor], part: str, x: Tensor, layers: int) -> Tensor:
    for i in range(layers):
        w, b = meta[f"process.{part}.{2 * i}.weight"], meta[f"process.{part}.{2 * i}.bias"]
        x = x @ w.T + b
        x = x.clamp(min=0) if i < layers - 1 else x
    return x


def latent(meta: dict[str, Tensor], x: Tensor, y: Tensor) -> Normal:
    h = (x @ meta["body.0.weight"].T + meta["body.0.bias"]).clamp(min=0)
    each = [dense(meta, "latent.encoder", torch.cat(p), 2) for p in zip(h, y, strict=True)]
    own = {name.removeprefix("process.latent."): value for name, value in meta.items()}
    hidden = (torch.stack(each).mean(0) @ own["hidden.weight"].T + own["hidden.bias"]).clamp(min=0)
    mean, raw = (hidden @ own["head.weight"].T + own["head.bias"]).chunk(2)
    return Normal(mean, 0.1 + 0.9 / (1 + (-raw).exp()))


def gaussian(
    meta: dict[str, Tensor], x: Tensor, y: Tensor, at: Tensor, heads: int, z: Tensor | None = None
) -> Normal:
    """Of one query after the other."""
    more = [] if z is None else [z]
    h, h_at = ((z @ meta["body.0.weight"].T + meta["body.0.bias"]).clamp(min=0) for z in (x, at))
    each = torch.stack([dense(meta, "encoder", torch.cat(p), 2) for p in zip(h, y, strict=True)])
    means, deviations = [], []
    for query in h_at:
        r = each.mean(0)
        if heads:
            keys = [dense(meta, "keys", z[None], 2) for z in (query, *h)]
            size = each.shape[1]
            weights = [meta[f"process.attention.{n}.weight"] for n in ("query", "key", "value")]
            r = F.multi_head_attention_forward(  # (examples, batch, features)
                keys[0][:, None], torch.cat(keys[1:])[:, None], each[:, None],
                size, heads, torch.cat(weights), None, None, None, False, 0.0,
                meta["process.attention.merge.weight"], None, need_weights=False,
            )[0][0, 0]  # fmt: skip
        mean, raw = dense(meta, "decoder", torch.cat([r, *more, query]), 2)
        means.append(mean)
        deviations.append(0.1 + 0.9 * (1 + raw.exp()).log())
    return Normal(torch.stack(means)[:, None], torch.stack(deviations)[:, None])


@pytest.mark.parametrize("own", [(), ATTENTION, ("algo.score_support=false",)])
def test_it_is_the_formula(own: tuple[str, ...]) -> None:
    setup, meta = made(*own)
    task = task_of(setup)
    heads = 4 if own == ATTENTION else 0
    queries, support = (
        gaussian(meta, task.support_x, task.support_y, x, heads)
        for x in (task.query_x, task.support_x)
    )
    logs = [queries.log_prob(task.query_y), support.log_prob(task.support_y)]
    scored = logs[:1] if "algo.score_support=false" in own else logs
    value, extra = setup.algorithm.loss(meta, task)
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(value, -torch.cat(scored).mean(), **close)
    torch.testing.assert_close(extra["metrics"]["log_likelihood"], logs[0].mean(), **close)
    low, high = (queries.icdf(torch.tensor(p, dtype=value.dtype)) for p in (0.05, 0.95))
    inside = ((task.query_y >= low) & (task.query_y <= high)).double().mean()
    assert float(extra["metrics"]["within_90"]) == float(inside)
    trace = setup.algorithm.trace(meta, task)
    error = (queries.mean - task.query_y).square().mean()
    torch.testing.assert_close(trace.query_score[-1], error, **close)
    torch.testing.assert_close(extra["loss"], error, **close)


@pytest.mark.parametrize("own", [(), ATTENTION, ("algo.score_support=false",)])
def test_the_latent_variable_is_that_of_the_formula(own: tuple[str, ...]) -> None:
    """Against the distributions of torch, with the same numbers drawn."""
    setup, meta = made("algo.latent=3", "algo.samples=5", *own)
    task, heads = task_of(setup), 4 if own == ATTENTION else 0
    support = (task.support_x, task.support_y)
    scored = [torch.cat(pair) for pair in zip((task.query_x, task.query_y), support, strict=True)]
    if "algo.score_support=false" in own:
        scored = [task.query_x, task.query_y]
    prior, posterior = latent(meta, *support), latent(meta, *scored)
    torch.manual_seed(5)
    value, extra = setup.algorithm.loss(meta, task)
    torch.manual_seed(5)
    z = posterior.mean + posterior.stddev * torch.randn_like(posterior.mean)
    logs = gaussian(meta, *support, scored[0], heads, z).log_prob(scored[1])
    apart = kl_divergence(posterior, prior).sum()
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(value, -logs.mean() + apart / len(logs), **close)
    torch.testing.assert_close(extra["metrics"]["kl"], apart, **close)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = [prior.mean + prior.stddev * one for one in noise]
    means = torch.stack([gaussian(meta, *support, task.query_x, heads, z).mean for z in drawn])
    error = (means.mean(0) - task.query_y).square().mean()
    torch.testing.assert_close(setup.algorithm.trace(meta, task).query_score[-1], error, **close)


def test_the_90_percent_are_those_within_1645_thousandths_of_a_deviation() -> None:
    setup, meta = made()
    task = task_of(setup)
    found = gaussian(meta, task.support_x, task.support_y, task.query_x, 0)
    shifts = torch.tensor([-1.7, -1.65, -1.64, 1.64, 1.65, 1.7], dtype=torch.float64)[:, None]
    placed = task._replace(query_y=found.mean + shifts * found.stddev)
    assert float(setup.algorithm.loss(meta, placed)[1]["metrics"]["within_90"]) == 2 / 6


@pytest.mark.parametrize("own", [(), ATTENTION, LATENT])
def test_the_order_of_the_support_set_does_not_matter(own: tuple[str, ...]) -> None:
    setup, meta = made(*own)
    task, order = task_of(setup), torch.randperm(10)
    assert setup.algorithm.adapt is not None
    outputs = [
        setup.algorithm.adapt(meta, task.support_x[o], task.support_y[o], None)(task.query_x)
        for o in (slice(None), order)
    ]
    torch.testing.assert_close(*outputs)


def test_attention_with_equal_weights_is_the_mean() -> None:
    """With keys of zero, and values that are handed on as they are."""
    setup, meta = made(*ATTENTION)
    plain, _ = made()
    meta |= {name: 0 * v for name, v in meta.items() if ".keys." in name}
    eye = torch.eye(12, dtype=torch.float64)
    meta |= {f"process.attention.{part}.weight": eye for part in ("value", "merge")}
    without = {name: meta[name] for name in plain.algorithm.init()}
    task = task_of(setup)
    ours, mean = setup.algorithm.loss(meta, task)[0], plain.algorithm.loss(without, task)[0]
    torch.testing.assert_close(ours, mean)


@pytest.mark.parametrize("own", [(), ATTENTION, LATENT])
def test_the_gradient_of_each_parameter_is_that_of_finite_differences(own: tuple[str, ...]) -> None:
    setup, fixed = made(*own)
    task = task_of(setup)

    def loss(meta: Any, task: Any) -> Any:
        torch.manual_seed(1)  # of the latent variable
        return setup.algorithm.loss(meta, task)

    meta = {name: value.clone().requires_grad_() for name, value in fixed.items()}
    grads = torch.autograd.grad(loss(meta, task)[0], list(meta.values()))
    for name, grad in zip(meta, grads, strict=True):
        h = 1e-6 / (float(grad.norm()) + 1e-9)
        ends = [float(loss(fixed | {name: fixed[name] + s * h * grad}, task)[0]) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * h)
        assert float(grad.square().sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_backbone_without_layers_is_the_papers_network() -> None:
    """Inputs as they are, and targets of several numbers."""
    inner = InnerLoop(sgd(0.1), (), "global", {})
    model = MLP((3,), 2, hidden=()).double()
    algorithm = cnp(
        Problem(model, OBJECTIVES["regression"], inner, 2, input_shape=(3,)), encoder=[5]
    )
    meta = algorithm.init()
    assert all(name.startswith("process.") for name in meta)
    assert meta["process.encoder.0.weight"].shape == (5, 3 + 2)
    assert meta["process.decoder.4.weight"].shape == (4, 128)
    assert algorithm.adapt is not None
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert algorithm.adapt(meta, x, y, None)(x).shape == (4, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (IMAGES, r"algo=cnp predicts numbers: choose a regression such as data=sinusoid"),
        ((*SINE, "algo.heads=2"), r"algo\.heads=2: it is for algo\.attention=true"),
        (
            (*SINE, "algo.attention=true", "algo.heads=3"),
            r"algo\.heads=3: must divide the last layer of algo\.encoder, 128",
        ),
        ((*SINE, "algo.samples=2"), r"algo\.samples=2: it is of algo\.latent; leave it out"),
        ((*SINE, "algo.encoder=[]"), r"algo\.encoder is empty"),
        ((*SINE, "algo.decoder=[0]"), r"algo\.decoder=0: must be from 1"),
        ((*SINE, "algo.least_deviation=0"), r"algo\.least_deviation=0\.0: must be from 1e-06 to 1"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of("algo=cnp", *settings)
