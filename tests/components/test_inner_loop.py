"""`inner_opt.schedule` and `inner_opt.precondition`: against torch's schedules, by differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from metarun.training.loop import meta_step
from metarun.training.setup import Setup
from metarun.training.state import fresh, restore, snapshot
from metarun.unroll._torch import pytree
from tests.setups import IMAGES, SINE, setup_of, task_of


def adapted_by_torch(
    setup: Setup, kind: str, rates: dict[str, float], end: float, length: int, steps: int
) -> Tensor:
    """The queries' outputs after steps of torch's SGD with torch's schedule."""
    task, model = task_of(setup), setup.algorithm.init()
    leaves = {name: value.clone().requires_grad_() for name, value in model.items()}
    own = {name: next(lr for p, lr in rates.items() if name.startswith(p)) for name in leaves}
    groups = [{"params": [leaf], "lr": own[name]} for name, leaf in leaves.items()]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    if kind == "cosine":
        schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, end)
    else:
        shares = [
            lambda t, lr=lr: (lr + (end - lr) * min(t, length) / length) / lr for lr in own.values()
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)

    def outputs(x: Tensor) -> Tensor:
        return F.linear(
            F.relu(F.linear(x, leaves["body.0.weight"], leaves["body.0.bias"])),
            leaves["head.weight"],
            leaves["head.bias"],
        )

    for _ in range(steps):
        optimizer.zero_grad()
        (outputs(task.support_x) - task.support_y).pow(2).mean().backward()
        optimizer.step()
        if schedule.last_epoch < length:  # torch's cosine turns back there
            schedule.step()
    return outputs(task.query_x).detach()


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("algo", ["maml", "reptile"])
@pytest.mark.parametrize("length", [None, 3])
def test_the_rate_falls_as_torch_has_it(kind: str, algo: str, length: int | None) -> None:
    settings = [
        *SINE, f"algo={algo}", "algo.inner_steps=5", "algo.eval_inner_steps=7", "inner_opt.lr=0.02",
        f"inner_opt.schedule={kind}", "inner_opt.min_lr=0.002",
    ]  # fmt: skip
    settings += [] if length is None else [f"inner_opt.schedule_steps={length}"]
    setup = setup_of(*settings)
    task, adapt = task_of(setup), setup.algorithm.adapt
    assert adapt is not None
    predict = adapt(setup.algorithm.init(), task.support_x, task.support_y, None)
    oracle = adapted_by_torch(setup, kind, {"": 0.02}, 0.002, length or 5, 7)
    torch.testing.assert_close(predict(task.query_x).detach(), oracle, rtol=1e-10, atol=1e-12)


def test_each_group_falls_from_its_own_rate() -> None:
    setup = setup_of(
        *SINE, "algo.inner_steps=4", "algo.eval_inner_steps=4", "inner_opt.schedule=cosine",
        "inner_opt.lr=0.02", "inner_opt.groups=[{params: head.*, lr: 0.05}]",
    )  # fmt: skip
    task, adapt = task_of(setup), setup.algorithm.adapt
    assert adapt is not None
    predict = adapt(setup.algorithm.init(), task.support_x, task.support_y, None)
    oracle = adapted_by_torch(setup, "cosine", {"head": 0.05, "": 0.02}, 0.0, 4, 4)
    torch.testing.assert_close(predict(task.query_x).detach(), oracle, rtol=1e-10, atol=1e-12)


def test_a_new_head_falls_over_the_steps_of_the_evaluation() -> None:
    fixed = setup_of(*IMAGES, "algo=baseline", "algo.eval_inner_steps=6", "inner_opt.lr=0.1")
    setup = setup_of(
        *IMAGES, "algo=baseline", "algo.eval_inner_steps=6", "inner_opt.lr=0.1",
        "inner_opt.schedule=cosine",
    )  # fmt: skip
    meta = setup.algorithm.init()
    task = task_of(setup)
    one, other = (s.algorithm.trace(meta, task).query_loss for s in (fixed, setup))
    assert torch.equal(one[:2], other[:2]) and not torch.allclose(one[-1], other[-1])


@pytest.mark.parametrize("settings", [
    ["inner_opt.schedule=cosine", "inner_opt.min_lr=0.01", "inner_opt.learn=[lr]"],
    ["inner_opt.schedule=linear", "inner_opt.min_lr=0.01", "inner_opt.learn=[lr]",
     "inner_opt.granularity=parameter_step"],
    ["inner_opt.precondition=meta_curvature"],
    ["inner_opt.precondition=kronecker", "inner_opt.learn=[lr]"],
    ["inner_opt.precondition=kronecker_psd", "inner_opt=adam"],
    ["inner_opt.precondition=meta_curvature", "algo.order=1"],
])  # fmt: skip
def test_the_meta_gradient_is_that_of_finite_differences(settings: list[str]) -> None:
    setup = setup_of(*IMAGES, "algo.inner_steps=2", "algo.eval_inner_steps=2", *settings)
    generator = torch.Generator().manual_seed(0)
    meta = {
        name: (v + 0.05 * torch.randn(v.shape, generator=generator, dtype=v.dtype)).requires_grad_()
        for name, v in setup.algorithm.init().items()
    }
    task = pytree.tree_map(lambda x: x[0], setup.train_tasks.sample(0, 1))
    loss = setup.algorithm.loss
    grads = torch.autograd.grad(loss(meta, task)[0], list(meta.values()))
    learned = [name for name in meta if name.startswith("inner_opt.")]
    assert learned
    first_order = "algo.order=1" in settings
    for name, grad in zip(meta, grads, strict=True):
        if name not in learned or first_order:
            continue
        along = torch.randn(grad.shape, generator=generator, dtype=grad.dtype)

        def at(shift: float, name: str = name, along: Tensor = along) -> float:
            moved = meta | {name: (meta[name] + shift * along).detach().requires_grad_()}
            return float(loss(moved, task)[0].detach())

        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        assert float((grad * along).sum()) == pytest.approx(slope, rel=2e-5, abs=1e-8), name
    if first_order:  # of the last inner step alone, in which the factors are linear
        assert all(grad.abs().sum() > 0 for name, grad in zip(meta, grads, strict=True))


@pytest.mark.parametrize("kind", ["meta_curvature", "kronecker", "kronecker_psd"])
def test_a_preconditioner_starts_as_none_and_is_learned(kind: str, tmp_path: Path) -> None:
    plain = setup_of(*IMAGES, "algo.inner_steps=2")
    setup = setup_of(*IMAGES, "algo.inner_steps=2", f"inner_opt.precondition={kind}")
    tasks = setup.source.sample("val", 0, 2)
    state = fresh(setup)
    bare = {name: value for name, value in state.meta.items() if name in plain.algorithm.init()}
    torch.testing.assert_close(setup.trace(state.meta, tasks), plain.trace(bare, tasks))
    factors = [name for name in state.meta if name.startswith("inner_opt.precondition.")]
    before = {name: state.meta[name].detach().clone() for name in factors}
    assert {name.rpartition("/")[2] for name in factors} == set(bare)
    for _ in range(2):
        meta_step(setup, state)
    assert any(not torch.equal(state.meta[name], before[name]) for name in factors)
    again = restore(
        setup, checkpoint.load(checkpoint.save(tmp_path, snapshot(setup, state), 1, None))
    )
    for _ in range(2):
        meta_step(setup, state)
        meta_step(setup, again)
    assert all(torch.equal(again.meta[name], value) for name, value in state.meta.items())


REFUSED = {
    "zero": (
        ["inner_opt.schedule=cosine", "algo.eval_inner_steps=3"],
        "rate is zero after 1 inner",
    ),
    "above": (["inner_opt.min_lr=0.5", "inner_opt.lr=0.1"], r"min_lr=0\.5: must be from 0 to 0\.1"),
    "word": (["inner_opt.schedule=stairs"], "inner_opt.schedule"),
    "implicit": (
        ["inner_opt.precondition=kronecker", "engine.gradient=implicit", "engine.proximal=1"],
        "cannot learn the factors of kronecker",
    ),
    "reptile": (["algo=reptile", "inner_opt.precondition=kronecker"], "inner_opt.precondition out"),
    "protonet": (["algo=protonet", "inner_opt.schedule=cosine"], "no inner loop"),
    "part": (
        ["inner_opt=partition", "inner_opt.parts=[{params: '*', name: sgd, schedule: cosine}]"],
        "sgd has no setting 'schedule'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    settings, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        setup_of(*IMAGES, *settings)
