"""Settings that change nothing are refused or named."""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from metarun.components.inner_opt.base import OF_THE_ALGORITHM, InnerOptConfig
from metarun.config.catalogue import Component, components, schemas
from metarun.errors import ConfigError
from metarun.training.evaluation import evaluate_split
from metarun.training.inert import FROM_THE_SECOND_STEP, refuse_way, without_effect
from metarun.training.loop import meta_step
from metarun.training.setup import build
from metarun.training.state import fresh
from tests.cli.test_cli import SHORT
from tests.conftest import Metarun
from tests.setups import config_of, setup_of


def named(*overrides: str, kind: str = "classification", outputs: int = 5) -> list[str]:
    told = without_effect(config_of(*overrides), kind, outputs)
    return [text.partition("=")[0] for text in told]


ONE = "algo.inner_steps=1 algo.eval_inner_steps=1"
INERT = {  # setting -> a command with it that does without it, and one that does not
    "engine.last=3": ("", "engine.gradient=truncated"),
    "engine.block=3": ("engine.gradient=mixed", "engine.gradient=checkpoint"),
    "engine.block=2": ("algo.inner_steps=10", "algo.inner_steps=11"),
    "engine.proximal=3": ("", "engine.gradient=implicit"),
    "engine.solver=neumann": ("", "engine.gradient=implicit"),
    "engine.solver_steps=3": ("engine.gradient=checkpoint", "engine.gradient=implicit"),
    "engine.solver_lr=3": (
        "engine.gradient=implicit", "engine.gradient=implicit engine.solver=neumann",
    ),
    "engine.samples=3": ("", "engine.gradient=evolution"),
    "engine.sigma=3": ("", "engine.gradient=evolution"),
    "engine.chunk=3": ("engine.batching=loop", "engine.batching=vmap"),
    "inner_opt.granularity=step": ("", "inner_opt.learn=[lr]"),
    "inner_opt.dampening=0.5": ("", "inner_opt.momentum=0.5"),
    "inner_opt.decoupled_weight_decay=true": (
        "inner_opt=adam", "inner_opt=adam inner_opt.weight_decay=1",
    ),
    "inner_opt.momentum=0.5": (ONE, "algo.eval_inner_steps=2"),
    "inner_opt.eta_plus=5": (f"{ONE} inner_opt=rprop", "inner_opt=rprop"),
    "inner_opt.beta1=0.5": (f"{ONE} inner_opt=adam", "inner_opt=adam"),
    "inner_opt.t0=3": ("inner_opt=asgd algo.inner_steps=9", ""),
    "outer_opt.min_lr=0.0001": ("", "outer_opt.schedule=cosine"),
    "backbone.width=3": ("backbone.widths=[3,4,5,6]", ""),
    "backbone.drop_size=3": ("backbone=resnet12", "backbone=resnet12 backbone.drop=0.1"),
    "data.split_seed=3": ("data=omniglot data.split=vinyals", "data=omniglot"),
    "augment.fill=0.5": ("augment.flip=0.5", "augment.crop=2"),
    "augment.query=[]": ("", "augment.crop=2"),
    "augment.support=[]": ("", "augment.crop=2"),
    "trainer.max_skipped=3": ("", "trainer.nonfinite=skip"),
    "trainer.wandb_project=mine": ("", "trainer.wandb=offline"),
}  # fmt: skip


@pytest.mark.parametrize("setting", INERT)
def test_a_setting_without_effect_is_named_and_one_with_it_is_not(setting: str) -> None:
    without, with_it = (command.split() for command in INERT[setting])
    assert named(*without, setting) == [setting.partition("=")[0]]
    if with_it:
        assert named(*with_it, setting) == []
    assert named(*without) == []


CHANGES = {
    "plain": (),
    "order": ("algo.order=1",),
    "anil": ("algo=anil",),
    "momentum": ("inner_opt.momentum=0.5", "algo.inner_steps=2"),
    "adam": ("inner_opt=adam",),
    "groups": ("inner_opt.groups=[{params:head.*,lr:0.2}]",),
    "learn": ("inner_opt.learn=[lr]", "inner_opt.granularity=parameter_step"),
    "adamw": ("outer_opt=adamw", "outer_opt.weight_decay=0.5"),
    "cosine": ("outer_opt.schedule=cosine",),
    "clip": ("outer_opt=sgd", "outer_opt.clip_norm=0.01"),
    "clip_value": ("outer_opt=sgd", "outer_opt.clip_value=0.01"),
}


def test_arguments_reach_the_run() -> None:
    """Each of these changes the training, so none is ignored."""
    ends = []
    for change in CHANGES.values():
        setup = setup_of(*SHORT, *change, "trainer.steps=4", "engine.precision=float64")
        state = fresh(setup)
        for _ in range(4):
            meta_step(setup, state)
        assert state.meta["head.weight"].dtype == torch.float64
        ends.append(tuple(state.meta["head.weight"].flatten().tolist()))
    assert len(set(ends)) == len(CHANGES)


def test_what_is_for_classes_is_named_or_refused_without_them() -> None:
    sums = "algo.reduction=per_shot"
    assert named(sums) == []
    assert named("data=sinusoid", sums, kind="regression", outputs=1) == ["algo.reduction"]
    sums = "algo.outer_reduction=per_shot"
    assert named(sums) == []
    assert named("data=sinusoid", sums, kind="regression", outputs=1) == ["algo.outer_reduction"]
    refuse_way(config_of("task.way=3"), "classification")
    refuse_way(config_of("data=sinusoid"), "regression")
    for way in (3, 5):
        with pytest.raises(ConfigError, match=f"task.way={way}: the tasks of data=sinusoid are r"):
            refuse_way(config_of("data=sinusoid", f"task.way={way}"), "regression")


def test_the_default_way_of_a_plugins_regression_is_no_wish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class Waves:
        name: str = "waves"

    config = config_of()
    config.data = Waves()
    monkeypatch.setitem(components("data"), "waves", Component(Waves, Waves, is_plugin=True))
    refuse_way(config, "regression")
    config.task.way = 3
    with pytest.raises(ConfigError, match=r"task\.way=3"):
        refuse_way(config, "regression")


def test_what_a_method_sets_itself_is_no_wish_of_the_users() -> None:
    assert named("algo=maml_pp", "inner_opt.learn=[]", "outer_opt.schedule=constant") == []
    asked = ("inner_opt.granularity=step", "outer_opt.min_lr=0.0005")
    told = named("algo=maml_pp", "inner_opt.learn=[]", "outer_opt.schedule=constant", *asked)
    assert told == ["inner_opt.granularity", "outer_opt.min_lr"]


def test_a_run_tells_of_them(metarun: Metarun) -> None:
    done = metarun("train", *SHORT, "trainer.steps=1", "engine.sigma=0.5", "engine.last=2")
    assert (
        "without effect: engine.last=2 (it is for engine.gradient=truncated, not auto); "
        "engine.sigma=0.5 (it is for engine.gradient=evolution, not auto)"
    ) in done.stderr
    assert "without effect" not in metarun("train", *SHORT, "trainer.steps=1").stderr
    refused = metarun("train", *SHORT, "task.way=3", "hydra.run.dir=run", code=2)
    assert "task.way=3: the tasks of data=sinusoid are regression" in refused.stderr


def test_minibatches_are_of_training_tasks_too() -> None:
    settings = ["algo=reptile", "task.shot=1", "algo.inner_batch=10", "data=glyphs"]
    told = without_effect(config_of(*settings), "classification", 5)
    assert any("algo.inner_batch=10" in words for words in told)
    config = config_of(*settings, "task.train.shot=10")
    assert not any("inner_batch" in words for words in without_effect(config, "classification", 5))


FREE = ("eps2", "step_size_min", "step_size_max", "d")  # limits that these steps do not reach
OF_THEIR_OWN = {
    "radam": ("beta2", "eps"),  # of steps that are rectified: from the sixth on
    "adafactor": ("clip_norm", "clip_value"),  # its first step is as long for all gradients
}
OTHER = {"d": 1.5, "eta_plus": 1.5, "eps": 0.1, "nesterov": None}  # values that are allowed


@pytest.mark.parametrize("inner_opt", [*FROM_THE_SECOND_STEP, "adadelta"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_setting_of_an_inner_optimizer_changes_a_run_or_is_named(
    inner_opt: str, steps: int
) -> None:
    base = ["data=sinusoid", "backbone=mlp", "backbone.hidden=[5]", "trainer.meta_batch=2",
            f"inner_opt={inner_opt}", f"algo.inner_steps={steps}",
            f"algo.eval_inner_steps={steps}", "engine.precision=float64"]  # fmt: skip
    base += ["inner_opt.lr=5.0"] * (inner_opt == "rprop")  # it turns back
    schema = schemas("inner_opt")[inner_opt]
    of_all = {*OF_THE_ALGORITHM, *(own.name for own in fields(InnerOptConfig))}
    plain = losses(base)
    for own in fields(schema):
        value = OTHER.get(own.name, other_than(own.default))
        allowed = own.name not in (*of_all, *FREE, *OF_THEIR_OWN.get(inner_opt, ()))
        if not allowed or value is None:
            continue
        given = [*base, f"inner_opt.{own.name}={value}"]
        same = torch.allclose(losses(given), plain, rtol=1e-11, atol=0)
        told = without_effect(config_of(*given), "regression", 1)
        assert same == bool(told), f"{own.name}={value}: {told}"


def other_than(default: object) -> object:
    if isinstance(default, bool):
        return str(not default).lower()
    return 0.7 * default or 0.3 if isinstance(default, float) else 0.01


def losses(settings: list[str]) -> Tensor:
    """Those of test tasks after each inner step, as the weights begin."""
    setup = build(config_of(*settings, "engine.compile=none"), torch.device("cpu"))
    meta = fresh(setup).meta
    return evaluate_split(setup, setup.trace, meta, "test", 4, lambda done: None).losses
