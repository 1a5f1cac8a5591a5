"""Settings that change nothing with the others as they are: a run names those that were given.

Where one makes the tasks others than the user may believe, it is refused.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from metarun.components.algo.descent import DescentConfig
from metarun.components.algo.meta_sgd import MetaSgdConfig
from metarun.components.algo.one_model import OneModelConfig
from metarun.components.data.split_by_class import (
    ALL_IN_THE_TEST,
    SplitConfig,
    is_split_by_class,
)
from metarun.config.augment import FILLED
from metarun.config.catalogue import is_plugin
from metarun.config.run import TaskConfig, TrainConfig
from metarun.episodes.source import EpisodeSource
from metarun.errors import ConfigError
from metarun.training.plan import LONG_LOOP


def refuse_way(config: TrainConfig, kind: str) -> None:
    """Refuse a number of classes for tasks that have none.

    Args:
        kind: of the tasks: "classification" or "regression".

    Raises:
        ConfigError: `task.way` was set.
    """
    name = config.data.name
    # A plugin's data set without a YAML file has the default, which nobody has asked for.
    unasked = {1, TaskConfig.way} if is_plugin("data", name) else {1}
    if kind != "classification" and config.task.way not in unasked:
        raise ConfigError(
            f"task.way={config.task.way}: the tasks of data={name} are {kind}, which has no "
            "classes: leave task.way out"
        )


FROM_THE_SECOND_STEP = {
    "sgd": ("momentum",),
    "rmsprop": ("momentum",),
    "rprop": ("eta_minus", "eta_plus"),
    "adagrad": ("lr_decay",),
    "adam": ("beta1", "beta2", "amsgrad"),
    "adamw": ("beta1", "beta2", "amsgrad"),
    "adamax": ("beta1", "beta2"),
    "nadam": ("beta2",),
    "radam": ("beta1", "beta2"),
    "adafactor": ("beta2_decay",),
    "asgd": ("alpha",),
}
"""Settings of inner optimizers that the first step does not depend on, but for rounding."""


def without_effect(
    config: TrainConfig, kind: str, outputs: int, source: EpisodeSource | None = None
) -> list[str]:
    """Settings that were given and change nothing, each with the reason, as `key=value (reason)`.

    Args:
        kind: of the tasks: "classification" or "regression".
        outputs: of the network.
        source: of the tasks; None: their split is not looked at.
    """
    told = []
    reasons = _reasons(config, kind, outputs) | _reasons_of_steps(config)
    reasons |= _reasons_of_split(config.data, source)
    for key, reason in reasons.items():
        group, _, name = key.partition(".")
        part = getattr(config, group)
        value = getattr(part, name, None)
        asked = is_dataclass(part) and name in _changed(part)
        if asked and not _is_preset(config, group, name):
            told.append(f"{key}={value} ({reason})")
    return told


def _is_long(algo: Any) -> bool:
    return isinstance(algo, DescentConfig) and algo.inner_steps > LONG_LOOP


def _changed(part: Any) -> set[str]:
    """The settings of a group that are not at their defaults."""
    plain = type(part)()
    return {f.name for f in fields(part) if getattr(part, f.name) != getattr(plain, f.name)}


def _is_preset(config: TrainConfig, group: str, name: str) -> bool:
    """Whether a setting has the value that the algorithm, the data or the backbone gives it."""
    value = getattr(getattr(config, group), name)
    parts = (config.algo, config.data, config.backbone)
    presets = [getattr(part, "usual", {}).get(group, {}) for part in parts]
    return any(name in preset and preset[name] == value for preset in presets)


def _reasons_of_steps(config: TrainConfig) -> dict[str, str]:
    """The same, for settings of inner steps that are not taken."""
    algo, inner = config.algo, config.inner_opt
    found = {}
    if isinstance(algo, DescentConfig) and max(algo.inner_steps, algo.eval_inner_steps) <= 1:
        later = (
            () if getattr(inner, "nesterov", False) else FROM_THE_SECOND_STEP.get(inner.name, ())
        )
        found = {f"inner_opt.{name}": "the first inner step is the only one" for name in later}
    if inner.name == "asgd":
        found["inner_opt.t0"] = "the average of the steps is not used"
    return found


def _reasons_of_split(data: Any, source: EpisodeSource | None) -> dict[str, str]:
    """The same, for settings of a split by class."""
    if not isinstance(data, SplitConfig):
        return {}
    if data.fractions == ALL_IN_THE_TEST:
        return {"data.split_seed": "all classes are in the test"}
    stores = getattr(source, "stores", {})
    classes = {split: store.class_names for split, store in stores.items()}
    if not classes or is_split_by_class(classes, data):
        return {}
    reason = "the data say themselves which classes are in which split"
    return dict.fromkeys(("data.split_seed", "data.fractions"), reason)


def _reasons(config: TrainConfig, kind: str, outputs: int) -> dict[str, str]:
    """Setting -> why it changes nothing, for those that change nothing now."""
    engine, algo, inner, outer = config.engine, config.algo, config.inner_opt, config.outer_opt
    data, trainer, network = config.data, config.trainer, vars(config.backbone)
    may_choose_blocks = engine.gradient == "auto" and _is_long(algo)
    modes = {
        "engine.last": ("truncated",),
        "engine.block": ("checkpoint", "auto" if may_choose_blocks else "checkpoint"),
        "engine.proximal": ("implicit",),
        "engine.solver": ("implicit",),
        "engine.solver_steps": ("implicit",),
        "engine.solver_lr": ("implicit",),
        "engine.samples": ("evolution",),
        "engine.sigma": ("evolution",),
    }
    found = {
        key: f"it is for engine.gradient={wanted[0]}, not {engine.gradient}"
        for key, wanted in modes.items()
        if engine.gradient not in wanted
    }
    scheduled = getattr(inner, "schedule", None) is not None
    shapes = (config.task, config.task.in_training())
    support = max(t.support if kind == "classification" else t.shot for t in shapes)
    every = "all examples of its part are taken, once each"
    one_model = isinstance(algo, OneModelConfig)
    rules = {
        "trainer.eval_episodes": (one_model, every),
        "trainer.test_episodes": (one_model, every),
        "algo.units": (
            vars(algo).get("weigh", "network") != "network",
            "algo.weigh has no network",
        ),
        "engine.solver_lr": (
            engine.gradient == "implicit" and engine.solver == "cg",
            "it is for engine.solver=neumann and fixed_point",
        ),
        "engine.chunk": (engine.batching == "loop", "a loop takes one task at a time"),
        "inner_opt.granularity": (not inner.learn, "inner_opt.learn names nothing to learn"),
        "inner_opt.dampening": (not getattr(inner, "momentum", 1), "inner_opt.momentum is 0"),
        "inner_opt.decoupled_weight_decay": (
            not getattr(inner, "weight_decay", 1),
            "inner_opt.weight_decay is 0",
        ),
        "algo.multi_step_loss": (
            isinstance(algo, DescentConfig) and algo.inner_steps == 1,
            "there is one inner step in training",
        ),
        "algo.inner_batch": (
            (vars(algo).get("inner_batch") or 0) >= support,
            f"a task has no more than {support} support examples",
        ),
        "algo.contrast_temperature": (not vars(algo).get("balance"), "algo.balance is 0"),
        "inner_opt.schedule": (
            scheduled
            and isinstance(algo, DescentConfig)
            and max(algo.inner_steps, algo.eval_inner_steps) <= 1,
            "the only inner step takes inner_opt.lr",
        ),
        "inner_opt.lr": (
            isinstance(algo, MetaSgdConfig),
            "algo=meta_sgd learns the rate of each element",
        ),
        "inner_opt.min_lr": (not scheduled, "inner_opt.schedule is not given"),
        "inner_opt.schedule_steps": (not scheduled, "inner_opt.schedule is not given"),
        "outer_opt.min_lr": (outer.schedule == "constant", "it is for outer_opt.schedule=cosine"),
        "algo.reduction": (
            kind != "classification" and outputs == 1,
            f"tasks of {kind} have no classes to sum over",
        ),
        "algo.outer_reduction": (
            kind != "classification",
            f"tasks of {kind} have no shots of classes to divide by",
        ),
        "augment.fill": (
            not {*FILLED}.intersection(config.augment.on),
            "nothing comes in from outside",
        ),
        "augment.support": (not config.augment.on, "no augmentation is on"),
        "augment.query": (not config.augment.on, "no augmentation is on"),
        "backbone.width": (network.get("widths") is not None, "backbone.widths is given"),
        "backbone.drop_size": (not network.get("drop", 1), "backbone.drop is 0"),
        "data.split_seed": (
            getattr(data, "split", "random") == "vinyals",
            "data.split=vinyals is a published list",
        ),
        "trainer.max_skipped": (
            trainer.nonfinite == "stop",
            "it is for trainer.nonfinite=skip",
        ),
        "trainer.wandb_project": (trainer.wandb == "off", "trainer.wandb is off"),
    }
    return found | {key: reason for key, (holds, reason) in rules.items() if holds}
