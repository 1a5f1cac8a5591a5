"""Every inner optimizer by its name: its settings are checked, reach it, and train."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch

from metarun.components.inner_opt.base import OF_EVERY_INNER_OPTIMIZER
from metarun.config.catalogue import builder, schemas
from metarun.config.component import as_keywords
from metarun.errors import ConfigError
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import fresh
from metarun.unroll import OPTIMIZERS
from tests.conftest import Metarun
from tests.setups import config_of

BASE = (
    "data=sinusoid",
    "backbone=mlp",
    "backbone.hidden=[6]",
    "trainer.meta_batch=3",
    "trainer.steps=10",  # not so many that the run would be compiled, for a minute
    "task.shot=4",
    "task.query=4",
    "algo.inner_steps=2",
    "engine.precision=float64",
)
FACTORIES = {make.__name__: make for make in OPTIMIZERS.values()}
TORCH_SCHEMAS = {name: schemas("inner_opt")[name] for name in FACTORIES}
MUON = (
    "inner_opt=partition",
    "inner_opt.parts=[{params:'*.weight',name:muon,ns_precision:full},{params:'*.bias',name:sgd}]",
)


def setup_of(*overrides: str) -> Setup:
    return build(config_of(*BASE, *overrides), torch.device("cpu"))


def trained(*overrides: str) -> dict[str, torch.Tensor]:
    """The meta-parameters after two meta-steps."""
    setup = setup_of(*overrides)
    state = fresh(setup)
    for _ in range(2):
        meta_step(setup, state)
    return {name: value.detach() for name, value in state.meta.items()}


@pytest.mark.parametrize("name", schemas("inner_opt"))
def test_it_trains_and_vmap_is_a_loop(name: str) -> None:
    choice = MUON if name == "muon" else (f"inner_opt={name}",)
    loop, mapped = (trained(*choice, f"engine.batching={how}") for how in ("loop", "vmap"))
    start = fresh(setup_of(*choice)).meta
    assert all(value.isfinite().all() for value in mapped.values())
    assert any(not torch.equal(value, start[key]) for key, value in mapped.items())
    for key, value in mapped.items():
        torch.testing.assert_close(value, loop[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in TORCH_SCHEMAS if name != "muon"])
def test_its_real_settings_can_be_learned(name: str) -> None:
    """All at once but eps, which the outer optimizer's first step would make negative, and t0."""
    hyper = [
        key
        for key in FACTORIES[name]().hyper
        if not key.startswith("eps") and (name, key) != ("asgd", "t0")  # refused: its own test
    ]
    learned = trained(f"inner_opt={name}", f"inner_opt.learn=[{','.join(hyper)}]")
    initial = fresh(setup_of(f"inner_opt={name}", "inner_opt.learn=[lr]")).meta["inner_opt.lr"]
    assert {f"inner_opt.{key}" for key in hyper} <= set(learned)
    assert all(value.isfinite().all() for value in learned.values())
    assert learned["inner_opt.lr"] != initial


@pytest.mark.parametrize("name", TORCH_SCHEMAS)
def test_its_settings_are_those_of_the_function(name: str) -> None:
    """With the same defaults, but for the lr, which suits few steps here."""
    ours = {f.name for f in fields(TORCH_SCHEMAS[name])} - {"name", *OF_EVERY_INNER_OPTIMIZER}
    parameters = inspect.signature(FACTORIES[name]).parameters
    missing = {"rprop": {"clip_norm", "clip_value"}}.get(name, set())
    assert ours | missing == set(parameters) | {"clip_norm", "clip_value"}
    for option, parameter in parameters.items():
        default: Any = {"adjust_lr_fn": None}.get(option, getattr(TORCH_SCHEMAS[name](), option))
        assert option == "lr" or default == parameter.default, option


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("inner_opt=muon",),
            "body.0.bias has the shape .* inner_opt=partition on the command line",
        ),
        (("inner_opt=adamw", "inner_opt.beta2=1"), "inner_opt.beta2=1.0: must be from 0"),
        (("inner_opt=adagrad", "inner_opt.lr_decay=-1"), "inner_opt.lr_decay=-1.0: must be 0 or"),
        (("inner_opt=nadam", "inner_opt.momentum_decay=-1"), "momentum_decay=-1.0: must be 0 or"),
        (("inner_opt=adadelta", "inner_opt.rho=1.5"), "inner_opt.rho=1.5: must be from 0 to 1"),
        (("inner_opt=rmsprop", "inner_opt.alpha=-1"), "inner_opt.alpha=-1.0: must be 0 or more"),
        (("inner_opt=rprop", "inner_opt.eta_minus=1"), "inner_opt.eta_minus=1.0: must be from"),
        (("inner_opt=rprop", "inner_opt.eta_plus=1"), "inner_opt.eta_plus=1.0: must be above 1"),
        (("inner_opt=asgd", "inner_opt.alpha=-1"), "inner_opt.alpha=-1.0: must be 0 or more"),
        (("inner_opt=asgd", "inner_opt.learn=[t0]"), "learn: t0 says .* never be learned"),
        (("inner_opt=adafactor", "inner_opt.beta2_decay=1"), "beta2_decay=1.0: must be 0 or less"),
        (("inner_opt=adafactor", "inner_opt.d=0.5"), "inner_opt.d=0.5: must be 1 or more"),
        (("inner_opt=muon", "inner_opt.ns_steps=100"), "ns_steps=100: must be from 0 to 99"),
        (("inner_opt=muon", "inner_opt.adjust_lr_fn=x"), "adjust_lr_fn=x: choose one of original"),
        (("inner_opt=adam", "inner_opt.clip_norm=0"), "inner_opt.clip_norm=0.0: must be above 0"),
        (("inner_opt=sgd", "inner_opt.nesterov=true"), "nesterov needs a momentum above 0"),
        (("inner_opt.lr=nan",), "inner_opt.lr=nan: must be a finite number"),
        (("inner_opt=rprop", "inner_opt.eta_plus=inf"), "eta_plus=inf: must be a finite"),
        (("inner_opt=muon", "inner_opt.ns_b=nan"), "inner_opt.ns_b=nan: must be a finite"),
        (("inner_opt=adam", "inner_opt.clip_norm=inf"), "clip_norm=inf: must be a finite"),
        (("outer_opt.lr=inf",), "outer_opt.lr=inf: must be a finite number"),
        (("outer_opt.weight_decay=nan",), "outer_opt.weight_decay=nan: must be a finite"),
        (("outer_opt.weight_decay=-1",), "outer_opt.weight_decay=-1.0: must be 0 or more"),
        (("outer_opt=adamw", "outer_opt.eps=-1"), "outer_opt.eps=-1.0: must be 0 or more"),
        (("outer_opt=adam", "outer_opt.beta1=1"), "outer_opt.beta1=1.0: must be from 0 to"),
        (("outer_opt=sgd", "outer_opt.momentum=-1"), "outer_opt.momentum=-1.0: must be 0 or more"),
        (("outer_opt=sgd", "outer_opt.nesterov=true"), "nesterov=true: needs a momentum above 0"),
        (("engine.sigma=inf",), "engine.sigma=inf: must be a finite number"),
    ],
)
def test_wrong_settings_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup_of(*overrides)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        ("sgd", "lr: -1", r"groups, head\.\*: lr=-1: must be 0 or more"),
        ("sgd", "lr: nan", r"groups, head\.\*: lr=nan: must be a finite number"),
        ("sgd", "dampening: 2", r"groups, head\.\*: dampening=2: must be from 0 to 1"),
        ("adam", "beta1: 1", r"groups, head\.\*: beta1=1: must be from 0"),
        ("adam", "max_norm: 0", r"groups, head\.\*: clip_norm=0: must be above 0"),
        ("newton", "damping: -1", r"groups, head\.\*: damping=-1: must be 0 or more"),
        ("partition", "1.trust_radius: 0", r"groups, head\.\*: 1\.trust_radius=0: must be above 0"),
        ("partition", "0.lr: -1", r"groups, head\.\*: 0\.lr=-1: must be 0 or more"),
        ("partition", "0.speed: 1", r"0\.speed: not a setting of this inner optimizer"),
        ("sgd", "speed: 1", "speed: not a setting of this inner optimizer"),
    ],
)
def test_settings_of_groups_are_checked_as_those_of_the_optimizer(
    optimizer: str, settings: str, message: str
) -> None:
    group = f"inner_opt.groups=[{{params: 'head.*', {settings}}}]"
    with pytest.raises(ConfigError, match=message):
        setup_of(f"inner_opt={optimizer}", group)


def test_a_wrong_setting_of_the_optimizer_is_no_groups_fault() -> None:
    with pytest.raises(ConfigError, match=r"^inner_opt\.lr=-1\.0: must be 0 or more"):
        setup_of("inner_opt.lr=-1", "inner_opt.groups=[{params: 'head.*', weight_decay: 0.1}]")
    setup_of("inner_opt=sgd", "inner_opt.groups=[{params: 'head.*', lr: 0, weight_decay: 1}]")


def test_gradient_driven_parts_serve_every_gradient_mode() -> None:
    parts = "[{params: 'body.*', name: sgd, lr: 0.02}, {params: 'head.*', name: adam, lr: 0.01}]"
    choice = ("inner_opt=partition", f"inner_opt.parts={parts}", "inner_opt.learn=[0.lr]")
    mixed_mode, reverse = (
        trained(*choice, f"engine.gradient={mode}") for mode in ("mixed", "reverse")
    )
    assert mixed_mode["inner_opt.0.lr"] != 0.02
    for key, value in mixed_mode.items():
        torch.testing.assert_close(value, reverse[key], rtol=1e-9, atol=1e-11)


def test_inner_gradients_are_clipped() -> None:
    plain, unbound = trained("inner_opt=sgd"), trained("inner_opt=sgd", "inner_opt.clip_norm=1e9")
    norm = trained("inner_opt=sgd", "inner_opt.clip_norm=0.01")
    value = trained("inner_opt=sgd", "inner_opt.clip_value=0.01")
    both = trained("inner_opt=sgd", "inner_opt.clip_value=0.01", "inner_opt.clip_norm=0.01")
    weights = [m["head.weight"] for m in (plain, norm, value, both)]
    assert torch.equal(plain["head.weight"], unbound["head.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    parts = "inner_opt.parts=[{{params: '*', name: sgd, lr: 0.01{}}}]"
    part = trained("inner_opt=partition", parts.format(", clip_norm: 0.01"))
    torch.testing.assert_close(part["head.weight"], norm["head.weight"])
    learned = trained("inner_opt=sgd", "inner_opt.clip_norm=0.01", "inner_opt.learn=[max_norm]")
    assert learned["inner_opt.max_norm"] != 0.01


@pytest.mark.parametrize("name", [n for n in TORCH_SCHEMAS if n not in ("muon", "rprop")])
def test_inner_gradients_are_clipped_by_value_and_then_by_norm(name: str) -> None:
    """The order of the outer gradients; all parameters together have one norm."""
    dropped = (*OF_EVERY_INNER_OPTIMIZER, "clip_norm", "clip_value")
    settings = as_keywords(TORCH_SCHEMAS[name](), *dropped)
    grads = {"w": torch.tensor([[3.0, -0.2], [0.1, 4.0]]), "b": torch.tensor([-5.0, 0.3])}
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    value, norm = 0.5, 0.6
    by_value = {key: grad.clamp(-value, value) for key, grad in grads.items()}
    length = torch.cat([grad.flatten() for grad in by_value.values()]).norm()
    by_both = {key: grad * norm / (length + 1e-6) for key, grad in by_value.items()}
    for given, expected in (
        ({"clip_value": value, "clip_norm": norm}, by_both),
        ({"clip_value": value}, by_value),
        ({"clip_norm": 99.0}, grads),
        ({}, grads),
    ):
        clipping, plain = builder("inner_opt", name)(**given), FACTORIES[name](**settings)
        ours, _ = clipping.update(grads, clipping.init(params), params, clipping.hyper)
        theirs, _ = plain.update(expected, plain.init(params), params, plain.hyper)
        for key in params:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-7)


def test_the_command_trains_with_an_optimizer_chosen_by_name(metarun: Metarun) -> None:
    done = metarun(
        "train", "data=sinusoid", "backbone=mlp", "trainer.steps=2", "trainer.eval_episodes=4",
        "trainer.test_episodes=4", "inner_opt=adafactor", "inner_opt.clip_norm=1",
        "inner_opt.learn=[lr,max_norm]",
    )  # fmt: skip
    assert "test mse" in done.stdout
    refused = metarun("train", "data=sinusoid", "backbone=mlp", "inner_opt=muon", code=2)
    assert "inner_opt=partition" in refused.stderr and len(refused.stderr.splitlines()) == 1
