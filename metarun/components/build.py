"""Every component by name, and a plugin's way to add its own.

A config chooses components by the names below, never by an import path: a config that came
out of a checkpoint cannot make the program import or call anything else.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from metarun.components.algo.anil import anil
from metarun.components.algo.base import OBJECTIVES, Algorithm, InnerLoop, Problem, refuse_frozen
from metarun.components.algo.maml import maml
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.components.contract import (
    check_inner_optimizer,
    check_network,
    check_outer_optimizer,
    check_outputs,
    check_source,
    checked_algorithm,
)
from metarun.components.data import glyphs, omniglot
from metarun.components.data.sinusoid import Sinusoids
from metarun.components.inner_opt.build import TORCH_BUILDERS
from metarun.config.inner_schemas import part_settings
from metarun.config.run import PLUGIN_OPTIONS, SCHEMAS, TaskConfig, TrainConfig, settings
from metarun.episodes.source import EpisodeSource, ImageEpisodes
from metarun.episodes.store import ClassStore
from metarun.errors import ConfigError
from metarun.system.memory import machine_memory
from metarun.unroll import (
    Checkpoint,
    Evolution,
    GradientMode,
    Implicit,
    InnerOptimizer,
    LossOptimizer,
    Record,
    Solver,
    Truncated,
    mixed,
    newton,
    partition,
    unrecorded,
)

log = logging.getLogger(__name__)

Builder = Callable[..., Any]

OF_EVERY_INNER_OPTIMIZER = ("learn", "granularity", "groups")


def image_episodes(load: Callable[..., dict[str, ClassStore]]) -> Builder:
    """What builds the episodes of a data set of images, from what loads it: split -> images."""

    def build(
        task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, /, **where: Any
    ) -> ImageEpisodes:
        return ImageEpisodes(
            load(**where),
            way=task.way,
            shot=task.shot,
            query=task.query,
            seed=seed,
            device=device,
            dtype=dtype,
        )

    return build


def _load_omniglot(root: str | None, **options: Any) -> dict[str, ClassStore]:
    return omniglot.load(None if root is None else Path(root), **options)


def _sinusoids(task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype) -> Sinusoids:
    return Sinusoids(shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)


def _mixed(parts: list[dict[str, Any]]) -> InnerOptimizer | LossOptimizer:
    built = []
    for part in parts:
        patterns, config = part_settings(part)
        build = BUILDERS["inner_opt"][config.name]
        built.append((patterns, build(**settings(config, *OF_EVERY_INNER_OPTIMIZER))))
    # Gradient-driven parts alone make a whole that is: every gradient mode serves it.
    loss_driven = any(isinstance(optimizer, LossOptimizer) for _, optimizer in built)
    return mixed(built) if loss_driven else partition(built)


def _outer_adam(kind: Callable[..., torch.optim.Optimizer]) -> Builder:
    def build(params: Any, beta1: float, beta2: float, **rest: Any) -> torch.optim.Optimizer:
        return kind(params, betas=(beta1, beta2), **rest)

    return build


OUTER_IMPLEMENTATION = {"fused": True}
"""How torch is to take the outer step: in one kernel. It is in param groups, but no setting."""

BUILDERS: dict[str, dict[str, Builder]] = {
    # build(problem, **settings) -> Algorithm
    "algo": {"maml": maml, "anil": anil},
    # build(task, seed, device, dtype, **settings) -> EpisodeSource
    "data": {
        "glyphs": image_episodes(glyphs.load),
        "omniglot": image_episodes(_load_omniglot),
        "sinusoid": _sinusoids,
    },
    # build(input_shape, outputs, **settings) -> nn.Module
    "backbone": {"conv4": Conv4, "mlp": MLP},
    # build(**settings) -> InnerOptimizer or LossOptimizer
    "inner_opt": {**TORCH_BUILDERS, "newton": newton, "mixed": _mixed},
    # build(params, **settings) -> torch.optim.Optimizer
    "outer_opt": {
        "adam": _outer_adam(torch.optim.Adam),
        "adamw": _outer_adam(torch.optim.AdamW),
        "sgd": torch.optim.SGD,
    },
}


def register(group: str, name: str, schema: type, build: Builder) -> None:
    """Add a component, for plugins: `metarun train +plugins=[my_module] <group>=<name>`.

    Args:
        group: "algo", "data", "backbone", "inner_opt" or "outer_opt".
        name: what configs call it.
        schema: a dataclass of its settings, with a field `name` that defaults to `name`
            (of the base class in `metarun.config.run`, for inner and outer optimizers).
        build: as in `BUILDERS`.

    Raises:
        ValueError: an unknown group, or a name that is taken.
    """
    if group not in BUILDERS:
        raise ValueError(f"unknown group {group!r}: choose from {', '.join(BUILDERS)}")
    if name in BUILDERS[group]:
        raise ValueError(f"{group}={name} exists already")
    BUILDERS[group][name] = build
    SCHEMAS[group][name] = schema
    PLUGIN_OPTIONS.append((group, name))


def build_data(config: TrainConfig, device: torch.device) -> EpisodeSource:
    """The episode source of a config.

    Raises:
        ConfigError: the data set cannot supply such episodes.
        DataError: its files are missing or damaged.
    """
    source: EpisodeSource = _build(
        "data",
        config.data,
        config.task,
        config.seed,
        device,
        dtype_of(config),
        **settings(config.data),
    )
    if ("data", config.data.name) in PLUGIN_OPTIONS:
        check_source(config.data.name, source, device, dtype_of(config))
    return source


def build_model(config: TrainConfig, source: EpisodeSource) -> nn.Module:
    """The network, with initial weights drawn from the global random state on the CPU."""

    def build() -> nn.Module:
        model: nn.Module = _build(
            "backbone",
            config.backbone,
            source.input_shape,
            source.outputs,
            **settings(config.backbone),
        )
        check_network(config.backbone.name, model)
        return model

    _check_parameters(build)
    model = build().to(dtype_of(config))
    given = (("backbone", config.backbone.name), ("algo", config.algo.name))
    if [part in PLUGIN_OPTIONS for part in given] == [True, False]:  # its own may want otherwise
        check_outputs(config.backbone.name, model, source)
    return model


def _check_parameters(build: Callable[[], nn.Module]) -> None:
    """Refuse a network whose parameters are larger than the memory of the machine.

    It is built without memory first: a checkpoint's config must not bring a machine down before
    anybody has seen that it is absurd. A plugin's network that cannot be built so is not checked.
    """
    left = machine_memory()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else parameter.nbytes
        if left < 0:
            raise ConfigError("the backbone's parameters are more than this machine has memory for")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            build()
    except ConfigError:
        raise
    except Exception as error:
        log.debug("the backbone cannot be built without memory: %s", error)
    finally:
        hook.remove()


def build_inner_optimizer(config: TrainConfig) -> InnerOptimizer | LossOptimizer:
    """The inner optimizer, without what is learned of it and without groups.

    Raises:
        ConfigError: its settings contradict.
    """
    own = settings(config.inner_opt, *OF_EVERY_INNER_OPTIMIZER)
    optimizer: InnerOptimizer | LossOptimizer = _build("inner_opt", config.inner_opt, **own)
    return optimizer


def build_algorithm(
    config: TrainConfig,
    model: nn.Module,
    source: EpisodeSource,
    record: Record = unrecorded,
    compares: bool = True,
) -> Algorithm:
    """The algorithm for a network and a data set.

    Args:
        record: applied to what is computed at each inner step.
        compares: whether it gets examples, to find out by them how it may compute the network.

    Raises:
        ConfigError: a pattern matches no parameter, or an optimizer's settings contradict.
    """
    inner_config, optimizer = config.inner_opt, build_inner_optimizer(config)
    check_inner_optimizer(inner_config.name, optimizer)
    groups = {
        group["params"]: {k: v for k, v in group.items() if k != "params"}
        for group in inner_config.groups
    }
    inner = InnerLoop(
        optimizer,
        tuple(inner_config.learn),
        inner_config.granularity,
        groups,
        _gradient_mode(config),
        record,
    )
    _refuse_frozen_parts(model, getattr(inner_config, "parts", []))

    def inputs() -> torch.Tensor:
        return source.sample("train", 0, 1).support_x[0]

    problem = Problem(
        model, OBJECTIVES[source.kind], inner, source.outputs, inputs if compares else None
    )
    algorithm = _build("algo", config.algo, problem, **settings(config.algo))
    return checked_algorithm(config.algo.name, algorithm)


def _refuse_frozen_parts(model: nn.Module, parts: list[dict[str, Any]]) -> None:
    try:
        for part in parts:
            refuse_frozen(model, part_settings(part)[0], "inner_opt.parts")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _gradient_mode(config: TrainConfig) -> GradientMode:
    engine = config.engine
    if engine.gradient == "auto":
        return "reverse"
    if getattr(config.algo, "order", 2) == 1 and engine.gradient != "first_order":
        raise ConfigError(
            f"engine.gradient={engine.gradient}: algo.order=1 means first_order; leave out one"
        )
    modes: dict[str, GradientMode] = {
        "reverse": "reverse",
        "first_order": "first_order",
        "mixed": "mixed",
        "truncated": Truncated(engine.last),
        "checkpoint": Checkpoint(engine.block),
        "implicit": Implicit(
            engine.proximal,
            cast(Solver, engine.solver),
            engine.solver_steps,
            engine.solver_lr,
        ),
        "evolution": Evolution(engine.samples, engine.sigma),
    }
    return modes[engine.gradient]


def build_outer_optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> Any:
    """The outer optimizer over param groups in torch's form.

    Raises:
        ConfigError: torch refuses the settings.
    """
    options = settings(config.outer_opt, "schedule", "min_lr", "clip_norm", "clip_value")
    optimizer = _build("outer_opt", config.outer_opt, groups, **options, **OUTER_IMPLEMENTATION)
    check_outer_optimizer(config.outer_opt.name, optimizer)
    return optimizer


def dtype_of(config: TrainConfig) -> torch.dtype:
    """The floating-point type of a run."""
    return torch.float64 if config.engine.precision == "float64" else torch.float32


def _build(group: str, component: Any, *args: Any, **options: Any) -> Any:
    try:
        return BUILDERS[group][component.name](*args, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
