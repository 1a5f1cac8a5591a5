"""Every component by name, and a plugin's way to add its own.

A config chooses components by the names below, never by an import path: a config that came
out of a checkpoint cannot make the program import or call anything else.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from metarun.components.algo.base import (
    Algorithm,
    Problem,
    refuse_frozen,
)
from metarun.components.algo.padding import objective_of
from metarun.components.contract import (
    check_network,
    check_outer_optimizer,
    check_outputs,
    checked_algorithm,
)
from metarun.components.fits import check_kind_of_data
from metarun.components.formats import in_format, precision_of
from metarun.components.inner import inner_loop_of
from metarun.components.inner_opt.partition import part_settings
from metarun.components.outer_opt.base import IMPLEMENTATION, OF_EVERY_OUTER_OPTIMIZER
from metarun.components.source_contract import CheckedSource, check_source
from metarun.components.weights import freeze, load_weights
from metarun.config.augment import AugmentConfig
from metarun.config.catalogue import (
    GROUPS,
    Component,
    build_component,
    builder,
    components,
    is_plugin,
)
from metarun.config.component import as_keywords, with_name
from metarun.config.run import TrainConfig
from metarun.episodes.ahead import Ahead
from metarun.episodes.augment import Augmentation, AugmentedEpisodes
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.source import (
    Batches,
    EpisodeSource,
    ImageEpisodes,
    an_episode,
    is_uneven,
    training_classes,
)
from metarun.episodes.uneven import uneven_of
from metarun.errors import ConfigError
from metarun.system.memory import machine_memory
from metarun.unroll import (
    Record,
    unrecorded,
)

log = logging.getLogger(__name__)

Builder = Callable[..., Any]


def register(group: str, name: str, schema: type, build: Builder) -> None:
    """Add a component, for plugins: `metarun train +plugins=[my_module] <group>=<name>`.

    Args:
        group: "algo", "data", "backbone", "inner_opt" or "outer_opt".
        name: what configs call it.
        schema: the class of its settings, a dataclass (see `metarun.config.component.settings`);
            of an inner or outer optimizer it inherits from `InnerOptConfig` or `OuterOptConfig`,
            in `base` of the group's folder. A field `name` is `name`, if there is one.
        build: what builds it. It gets what components of that group get, and the settings as
            keywords; `metarun.config.component.builds` makes one object of these.

    Raises:
        ValueError: an unknown group, a name that is taken, or settings of another name.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown group {group!r}: choose from {', '.join(GROUPS)}")
    if name in components(group):
        raise ValueError(f"{group}={name} exists already")
    components(group)[name] = Component(with_name(schema, name), build, is_plugin=True)


def build_data(config: TrainConfig, device: torch.device) -> EpisodeSource:
    """The data of a config.

    Raises:
        ConfigError: the data set cannot supply such episodes.
        DataError: its files are missing or damaged.
    """
    source: EpisodeSource = build_component(
        "data",
        config.data,
        config.task,
        config.seed,
        device,
        dtype_of(config),
        **as_keywords(config.data),
    )
    if is_plugin("data", config.data.name) and not isinstance(source, LabelledExamples):
        check_source(config.data.name, source, device, dtype_of(config))
        source = cast(EpisodeSource, CheckedSource(config.data.name, source))
    if config.task.within == "group" and getattr(source, "within", "all") != "group":
        raise ConfigError(
            f"task.within={config.task.within}: data={config.data.name} has no classes in groups; "
            "leave it out"
        )
    if config.task.uneven is not None and getattr(source, "uneven", None) is None:
        raise ConfigError(
            f"task.{config.task.uneven}: the tasks of data={config.data.name} have one shape; "
            "leave it out"
        )
    return source


def training_source(
    config: TrainConfig, source: EpisodeSource, device: torch.device
) -> EpisodeSource:
    """The source of training episodes: the same one, unless `task.train` gives another shape.

    Raises:
        ConfigError: the data set cannot supply such episodes.
    """
    task = config.task.in_training()
    if task is config.task:
        return source
    if source.kind != "classification" and config.task.train.way is not None:
        raise ConfigError(
            f"task.train.way={task.way}: the tasks of data={config.data.name} are {source.kind}, "
            "which has no classes: leave task.train.way out"
        )
    if isinstance(source, ImageEpisodes):  # which share their images
        try:
            return source.of_shape(task.way, task.shot, task.query, task.within, uneven_of(task))
        except ValueError as error:
            raise ConfigError(str(error).replace("task.", "task.train.")) from error
    try:
        return build_data(replace(config, task=task), device)
    except ConfigError as error:
        raise ConfigError(str(error).replace("task.", "task.train.")) from error


class Reader(Protocol):
    """What meta-steps learn from."""

    def sample(self, start: int, count: int) -> Any:
        """Numbers `start` … `start + count - 1`, as tensors with a first dimension of `count`."""
        ...


def training_tasks(
    algorithm: Algorithm,
    source: EpisodeSource,
    augment: AugmentConfig | None = None,
    seed: int = 0,
) -> Reader:
    """What an algorithm learns from: training episodes, or batches of labelled examples.

    Args:
        augment: what is done to their pictures; None: nothing.
        seed: of these changes.

    Raises:
        ConfigError: it learns from plain batches, and the source has no labelled images.
    """
    if isinstance(source, LabelledExamples):
        assert algorithm.one_model is not None
        found: Reader = algorithm.one_model.reads(source)
        return found
    if augment is not None and not augment.on:
        augment = None
    if algorithm.batch_size is None:
        augmented = source if augment is None else AugmentedEpisodes(source, augment, seed)
        return Ahead(augmented, "train")
    if not isinstance(source, ImageEpisodes):
        raise ConfigError(
            "the algorithm learns from plain batches of labelled images, which these data do not "
            "have: choose data=glyphs or data=omniglot"
        )
    change = None if augment is None else Augmentation(augment, None, seed)
    return Batches(source, algorithm.batch_size, change)


def build_model(config: TrainConfig, source: EpisodeSource, loads: bool = True) -> nn.Module:
    """The network, with initial weights drawn from the global random state on the CPU.

    Args:
        loads: whether it gets the weights of `backbone.weights`. A checkpoint that is evaluated
            holds all that has become of them.
    """

    seed = torch.initial_seed() % 2**32  # constants may be drawn by others than torch, too

    def build() -> nn.Module:
        with _others_seeded(seed):
            model: nn.Module = build_component(
                "backbone",
                config.backbone,
                source.input_shape,
                source.outputs,
                **as_keywords(config.backbone),
            )
        check_network(config.backbone.name, model)
        return model

    _check_parameters(build)
    model, own = build().to(dtype_of(config)), vars(config.backbone)
    if loads and own.get("weights") is not None:  # a plugin's may lack the settings of ours
        load_weights(model, own["weights"])
    freeze(model, own.get("frozen", []))
    # A plugin's algorithm may want a network of its own to give something else.
    if is_plugin("backbone", config.backbone.name) and not is_plugin("algo", config.algo.name):
        check_outputs(config.backbone.name, model, source)
    return model


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    """A seed for the random numbers of Python and NumPy in a block; their state is kept."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


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
    except Exception as error:  # of any type: a plugin may need real tensors
        log.debug("the backbone cannot be built without memory: %s", error)
    finally:
        hook.remove()


def build_algorithm(
    config: TrainConfig,
    model: nn.Module,
    source: EpisodeSource,
    record: Record = unrecorded,
    compares: bool = True,
    train_source: EpisodeSource | None = None,
    classes: int | None = None,
) -> Algorithm:
    """The algorithm for a network and a data set.

    Args:
        record: applied to what is computed at each inner step.
        compares: whether it gets examples, to find out by them how it may compute the network.
        train_source: of training episodes, if they have another shape.
        classes: of the data that the network was trained on, if these are others.

    Raises:
        ConfigError: a pattern matches no parameter, an optimizer's settings contradict, or the
            algorithm learns from data of another kind.
    """
    inner = inner_loop_of(config, record)
    _refuse_frozen_parts(model, vars(config.inner_opt).get("parts", []))

    trained = source if train_source is None else train_source

    def inputs() -> list[torch.Tensor]:
        task = an_episode(trained)
        return [task.support_x[0], task.query_x[0]]

    uneven = is_uneven(source, trained)
    ways = (trained.outputs, source.outputs) if source.kind == "classification" else None
    problem = Problem(
        model,
        objective_of(source.kind, uneven),
        inner,
        source.outputs,
        inputs if compares else None,
        ways,
        tuple(source.input_shape),
        classes or training_classes(source),
        norm_of(config),
        source.count("train") if isinstance(source, LabelledExamples) else None,
        uneven,
        precision_of(config),
    )
    algorithm = build_component("algo", config.algo, problem, **as_keywords(config.algo))
    checked = checked_algorithm(config.algo.name, algorithm)
    check_kind_of_data(config, checked, source)
    return in_format(checked, problem.precision.outer)


def norm_of(config: TrainConfig) -> str:
    """What the queries of a task are normalised by; a plugin's backbone may not have the choice."""
    return str(vars(config.backbone).get("norm", "transductive"))


def _refuse_frozen_parts(model: nn.Module, parts: list[dict[str, Any]]) -> None:
    try:
        for part in parts:
            refuse_frozen(model, part_settings(part)[0], "inner_opt.parts")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_outer_optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> Any:
    """The outer optimizer over param groups in torch's form.

    Raises:
        ConfigError: torch refuses the settings.
    """
    options = as_keywords(config.outer_opt, *OF_EVERY_OUTER_OPTIMIZER)
    build = builder("outer_opt", config.outer_opt.name)
    if not hasattr(build, "takes"):  # an older plugin's takes torch's own arguments
        options |= IMPLEMENTATION
    optimizer = build_component("outer_opt", config.outer_opt, groups, **options)
    check_outer_optimizer(config.outer_opt.name, optimizer)
    return optimizer


def dtype_of(config: TrainConfig) -> torch.dtype:
    """The floating-point type of a run's weights and data."""
    return torch.float64 if config.engine.precision == "float64" else torch.float32
