"""A network that computes in bfloat16, beside weights, losses and steps in float32."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components import formats
from metarun.components.algo.base import apply_model
from metarun.components.backbone.norm import BatchNorm
from metarun.components.formats import check_precision, without_gpu
from metarun.components.precision import computing_in
from metarun.config.changes import changed, otherwise
from metarun.config.trained import EvalConfig, EvalEngine
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.training.setup import Setup
from tests.conftest import Metarun
from tests.setups import config_of, setup_of, stirred, task_of

BF16 = torch.bfloat16
TASKS = ("trainer.meta_batch=2", "engine.compile=none")
SINE = ("data=sinusoid", "backbone=mlp", "backbone.hidden=[6]", "inner_opt.lr=0.05", *TASKS)
IMAGES = (
    "data=glyphs", "backbone=conv4", "backbone.width=4", "task.way=3", "task.query=2", *TASKS,
)  # fmt: skip


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def by_hand(meta: Any, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The MLP 1-6-1, each of its products in a format."""
    for i, name in enumerate(("body.0", "head")):
        weight, bias = meta[f"{name}.weight"], meta[f"{name}.bias"]
        x = F.linear(cast(x, dtype), cast(weight, dtype), cast(bias, dtype))
        x = x.relu() if i == 0 else x
    return x.float()


def maml_by_hand(
    setup: Setup, meta: dict[str, Tensor], inner: torch.dtype | None, outer: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The query loss after one inner step, and the support loss before it."""
    task, lr = task_of(setup), setup.config.inner_opt.lr
    support = (by_hand(meta, task.support_x, inner) - task.support_y).square().mean()
    grads = torch.autograd.grad(support, list(meta.values()), create_graph=True)
    fast = {n: v - lr * g for (n, v), g in zip(meta.items(), grads, strict=True)}
    query = (by_hand(fast, task.query_x, outer) - task.query_y).square().mean()
    return query, support


@pytest.mark.parametrize("mode", ["reverse", "checkpoint"])
@pytest.mark.parametrize(
    ("settings", "inner", "outer"),
    [
        (("engine.precision=bf16",), BF16, BF16),
        (("engine.precision=bf16", "engine.inner_precision=float32"), None, BF16),
        (("engine.inner_precision=bf16",), BF16, None),
    ],
    ids=["both", "outer", "inner"],
)
def test_support_and_queries_are_computed_as_by_hand(
    settings: tuple[str, ...], inner: torch.dtype | None, outer: torch.dtype | None, mode: str
) -> None:
    setup = setup_of(*SINE, *settings, f"engine.gradient={mode}")
    meta = stirred(setup)
    assert {value.dtype for value in meta.values()} == {torch.float32}
    value, extra = setup.algorithm.loss(meta, task_of(setup))
    wanted, support = maml_by_hand(setup, meta, inner, outer)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(extra["inner_losses"][0], support, rtol=1e-6, atol=0)
    found = torch.autograd.grad(value, list(meta.values()))
    expected = torch.autograd.grad(wanted, list(meta.values()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    other_format, _ = maml_by_hand(setup, meta, None, None)
    assert value.item() != other_format.item()  # float32 would be seen


@pytest.mark.parametrize("algo", ["maml", "anil", "protonet", "r2d2", "baseline", "matchingnet"])
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_results_are_near_those_of_float32_and_in_its_format(algo: str, batching: str) -> None:
    figures = []
    for precision in ("float32", "bf16"):
        setup = setup_of(
            *IMAGES, f"algo={algo}", f"engine.batching={batching}", f"engine.precision={precision}"
        )
        meta = stirred(setup)
        grads, metrics = setup.gradient(meta, setup.train_tasks.sample(0, 2))
        assert [grad.dtype for grad in grads.values()] == [v.dtype for v in meta.values()]
        constants = {name: value.detach() for name, value in meta.items()}
        trace = setup.trace(constants, setup.source.sample("val", 0, 2))
        assert trace.query_loss.dtype == torch.float32
        figures.append((metrics.loss.item(), float(trace.query_loss[:, -1].mean())))
    (trained, scored), (rough, roughly) = figures
    assert (trained, scored) != (rough, roughly)
    assert math.isclose(trained, rough, rel_tol=0.05)
    assert math.isclose(scored, roughly, rel_tol=0.05)


def test_a_recording_computes_in_the_same_format() -> None:
    found = []
    for how in ("none", "replay"):
        setup = setup_of(*SINE, "engine.precision=bf16", f"engine.compile={how}")
        for step in range(4):  # recorded and compared with its function
            grads, _ = setup.gradient(stirred(setup, step), setup.train_tasks.sample(2 * step, 2))
        found.append(grads)
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name])


def test_moments_are_those_of_float32() -> None:
    """Of values far from 0, bfloat16 would leave nothing of the variance."""
    layer = BatchNorm(2)
    x = (1000 + torch.randn(64, 2, 8, 8)).bfloat16()
    out = layer(x)
    assert out.dtype == BF16
    exact = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) / x.double().std(
        (0, 2, 3), keepdim=True
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


def test_outputs_come_back_in_the_format_of_the_weights() -> None:
    model = torch.nn.Linear(3, 2)
    weights, x = dict(model.named_parameters()), torch.randn(4, 3)
    plain = apply_model(model, weights, x)
    with computing_in(BF16):
        rough = apply_model(model, weights, x)
        with computing_in(None):
            assert torch.equal(apply_model(model, weights, x), plain)
    assert rough.dtype == torch.float32
    assert torch.equal(rough, rough.bfloat16().float())
    assert not torch.equal(rough, plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("engine.precision=tf32", "device=cpu"), "only GPUs compute in it"),
        (("engine.precision=bf16", "engine.gradient=evolution"), "bfloat16 rounds away"),
        (("engine.precision=bf16", "engine.gradient=implicit"), "too rough to solve"),
        (("engine.precision=bf16", "engine.gradient=mixed"), "rounds apart"),
        (("engine.inner_precision=bf16", "inner_opt=newton"), "does not keep"),
        (("engine.inner_precision=bf16", "engine.precision=float64"), "float32 or bf16"),
        (("engine.inner_precision=bf16", "algo=reptile", "data=glyphs"), "algo.order"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of("data=sinusoid", "backbone=mlp", *settings)


def test_newton_steps_may_have_queries_in_bfloat16() -> None:
    sine = [one for one in SINE if not one.startswith("inner_opt")]
    setup = setup_of(
        *sine, "inner_opt=newton", "engine.precision=bf16", "engine.inner_precision=float32"
    )
    assert setup.algorithm.loss(stirred(setup), task_of(setup))[0].isfinite()


def test_a_run_learns_and_is_evaluated_in_both_formats(metarun: Metarun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metarun(
        "train", "algo=protonet", "data=glyphs", "backbone=conv4", "backbone.width=8",
        "engine.precision=bf16", "trainer.steps=60", "trainer.test_episodes=100",
        "trainer.eval_every=60", "trainer.eval_episodes=20", f"hydra.run.dir={folder}",
    )  # fmt: skip
    own = checkpoint.load(checkpoint.find(folder))
    assert {value.dtype for value in own["meta"].values()} == {torch.float32}
    scores = {}
    for precision in ("bf16", "float32"):
        done = metarun(
            "eval", f"ckpt={folder}", f"engine.precision={precision}", "episodes=100",
            f"hydra.run.dir={tmp_path / precision}",
        )  # fmt: skip
        assert ("engine.precision=float32" in done.stderr) == (precision == "float32")
        scores[precision] = done
    assert config_of().engine.precision == "float32"


def test_what_is_computed_again_has_the_same_format() -> None:
    """Steps ahead of one model, which no algorithm of tasks takes."""
    ahead = (
        "algo=look_ahead", "data=glyphs_examples", "backbone=conv4", "backbone.width=2",
        "inner_opt.learn=[lr]", "algo.ahead=2", "algo.batch_size=4", "engine.compile=none",
        "engine.precision=bf16",
    )  # fmt: skip
    found = []
    for mode in ("reverse", "checkpoint"):
        setup = setup_of(*ahead, f"engine.gradient={mode}")
        grads, _ = setup.gradient(stirred(setup), setup.train_tasks.sample(0, 1))
        found.append(grads["inner_opt.lr"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


def test_the_network_of_neural_processes_has_it_too() -> None:
    figures = []
    for precision in ("float32", "bf16"):
        setup = setup_of("algo=cnp", "data=gp_curves", "backbone=identity",
                         f"engine.precision={precision}")  # fmt: skip
        figures.append(setup.algorithm.loss(stirred(setup), task_of(setup))[0].detach())
    assert figures[0] != figures[1]
    torch.testing.assert_close(*figures, rtol=0.1, atol=0)


RUN = (*SINE, "engine.precision=bf16", "engine.inner_precision=float32")


@pytest.mark.parametrize(
    ("trained", "asked", "format_", "other"),
    [
        (RUN, {"precision": "bf16"}, ("bf16", None), {"engine.inner_precision": None}),
        (
            (*SINE, "engine.inner_precision=bf16"),
            {"precision": "float32"},
            ("float32", None),
            {"engine.inner_precision": None},
        ),
        (RUN, {}, ("bf16", "float32"), {}),
        (
            RUN,
            {"precision": "float32"},
            ("float32", None),
            {"engine.precision": "float32", "engine.inner_precision": None},
        ),
        (SINE, {"precision": "bf16"}, ("bf16", None), {"engine.precision": "bf16"}),
    ],
)
def test_an_evaluation_says_in_what_other_format_it_is(
    trained: tuple[str, ...], asked: dict[str, Any], format_: Any, other: dict[str, Any]
) -> None:
    own = config_of(*trained)
    config = changed(own, EvalConfig("run", engine=EvalEngine(**asked)))
    assert (config.engine.precision, config.engine.inner_precision) == format_
    assert otherwise(own, config) == other


def test_a_run_of_tf32_is_evaluated_in_float32_where_no_gpu_is() -> None:
    own, cpu = config_of("engine.precision=tf32"), torch.device("cpu")
    config = without_gpu(own, changed(own, EvalConfig("run")), cpu)
    assert otherwise(own, config) == {"engine.precision": "float32"}
    other = config_of()
    asked = changed(other, EvalConfig("run", engine=EvalEngine(precision="tf32")))
    with pytest.raises(ConfigError, match="only GPUs"):
        check_precision(without_gpu(other, asked, cpu), cpu, trains=False)


def test_newton_steps_of_an_evaluation_are_not_in_bfloat16() -> None:
    own = config_of("inner_opt=newton")
    config = changed(own, EvalConfig("run", engine=EvalEngine(precision="bf16")))
    with pytest.raises(ConfigError, match="newton"):
        check_precision(config, torch.device("cpu"), trains=False)


def test_tf32_is_as_before_when_a_function_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, state = [], [True]

    def allow(allowed: bool) -> bool:
        before, state[0] = state[0], allowed
        return before

    monkeypatch.setattr(formats, "allow_tf32", allow)
    formats.with_tf32(False, lambda: seen.append(state[0]))()
    assert (seen, state) == ([False], [True])
