"""From a config to live objects; training and evaluation share this."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from metarun.components.algo.base import HYPERPARAMETERS, Algorithm, Objective
from metarun.components.algo.normalising import MEANING
from metarun.components.algo.padding import objective_of
from metarun.components.build import (
    Reader,
    build_algorithm,
    build_data,
    build_model,
    norm_of,
    training_source,
    training_tasks,
)
from metarun.components.fits import check_augment, check_fits, refuse_mixing
from metarun.components.formats import check_precision
from metarun.components.network import Network, refuse_kept_results, refuse_lost_state
from metarun.config.augment import AugmentConfig
from metarun.config.catalogue import GROUPS, schemas
from metarun.config.checks import fits, read
from metarun.config.run import EngineConfig, TaskConfig, TrainConfig, TrainerConfig, TrainTaskConfig
from metarun.episodes.ahead import Ahead
from metarun.episodes.identity import identity_of
from metarun.episodes.rng import stream_key
from metarun.episodes.source import EpisodeSource, is_uneven
from metarun.errors import CheckpointError, ConfigError
from metarun.system.memory import machine_memory
from metarun.system.ranks import ALONE, Ranks
from metarun.training.buffers import settle, with_kept_buffers
from metarun.training.chunking import AsManyAsFit
from metarun.training.domain import Domain, refuse_no_training, refuse_other_shape
from metarun.training.made_programs import Programs
from metarun.training.outer_groups import group_of_each
from metarun.training.plan import Plan, make_plan, use_fused_norms, with_gradient
from metarun.training.programs import (
    Advance,
    Gradient,
    Outputs,
    Recorder,
    Traces,
    advance_program,
    gradient_program,
    keep_compiled,
    outputs_program,
    trace_program,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """Everything that a config describes, built."""

    config: TrainConfig
    device: torch.device
    ranks: Ranks
    source: EpisodeSource
    model: nn.Module
    network: Network  # its buffers and frozen parameters
    train_tasks: Reader  # what a meta-step learns from
    algorithm: Algorithm
    objective: Objective
    plan: Plan
    planned_for: int  # meta-steps that the plan was made for: those the run began with
    gradient: Gradient
    advance: Advance | None  # the steps that one model takes after meta-steps
    trace: Traces
    outputs: Outputs | None  # None: the algorithm does not give them
    recheck: Callable[[], None]  # have recordings compared with their functions at the next call
    chunks: dict[str, AsManyAsFit]  # of engine.chunk=auto: "gradient", "trace", "outputs"
    identity: str  # of the data
    batch_norm: str  # which statistics batch normalisation uses, for the result line
    parameters: dict[str, int | None]  # numbers: how many are learned, adapted, frozen

    @property
    def steps(self) -> int:
        """Meta-steps of the run: none where the algorithm meta-learns nothing."""
        return self.config.trainer.steps if self.algorithm.learns else 0


def build(
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
    planned_for: int | None = None,
    trained_with: int | None = None,
    source: EpisodeSource | None = None,
    domain: Domain | None = None,
) -> Setup:
    """Load the data, make the network and the algorithm.

    The initial weights are drawn on the CPU from the seed, so they do not depend on the device.

    Args:
        planned_for: meta-steps that the run began with, if it has become longer since.
        trained_with: the seed of the run whose network is evaluated, which may be another one
            than that of the episodes; None for a run that is trained.
        source: what has tasks of the config's shape; None: the data of the config.
        domain: says that the data are of another domain than those of that run.

    Raises:
        ConfigError: the parts of the config do not fit together.
        DataError: the data are missing or damaged.
    """
    keep_compiled()
    check_precision(config, device, trains=trained_with is None)
    # Attention has a fast path for evaluations alone, which cannot be recorded.
    torch.backends.mha.set_fastpath_enabled(False)
    if domain is not None:  # which nothing is trained on
        train_source = source = domain.source(config, device)
        refuse_other_shape(config, source)
    else:
        source = build_data(config, device) if source is None else source
        refuse_no_training(config.data.name, source)
        train_source = training_source(config, source, device)
    _check_size(config, source)
    torch.manual_seed(seed_of_weights(config.seed if trained_with is None else trained_with))
    model = build_model(config, source, loads=trained_with is None)
    refuse_lost_state(model)
    refuse_kept_results(model, source.input_shape)
    network = Network(model.to(device))
    changes, engine = settle(
        config, network, model, train_source, device, ranks, trained_with is None
    )
    settled = replace(config, engine=engine)
    planned_for = config.trainer.steps if planned_for is None else planned_for
    begun = replace(settled, trainer=replace(config.trainer, steps=planned_for))
    computed = with_gradient(begun, model, device)
    plan = make_plan(computed, model, device)
    use_fused_norms(model, plan.fused_norm)
    if engine.chunk == "auto" and plan.batching == "loop":
        log.info("engine.chunk=auto has no effect: tasks are computed one after the other")
    record_step = Recorder(plan.inner_step, "inner steps", tells=False)
    classes = None if domain is None else domain.classes
    algorithm = build_algorithm(
        computed, model, source, record_step, train_source=train_source, classes=classes
    )
    if domain is not None and algorithm.one_model is not None:
        raise ConfigError(
            f"data={config.data.name}: the run trained one model, which tells the classes of its "
            "own data apart and no others; leave data out"
        )
    check_fits(config, algorithm, source, train_source)
    if trained_with is None:
        check_augment(config, algorithm, train_source)
    if is_uneven(source, train_source):
        refuse_mixing(config, model, train_source)
    if algorithm.learns:
        group_of_each(config.outer_opt, [n for n in algorithm.init() if n not in algorithm.kept])
    if changes.evaluation:
        algorithm = with_kept_buffers(model, algorithm)
    batch_norm = "none" if not algorithm.init() else getattr(model, "batch_norm", None)
    if batch_norm is None and "norm" in vars(config.backbone):
        batch_norm = MEANING[norm_of(config)]
    programs = Programs(config, computed, algorithm, plan, model, device, [record_step], {})
    return Setup(
        config,
        device,
        ranks,
        source,
        model,
        network,
        training_tasks(algorithm, train_source, config.augment, config.seed)
        if domain is None
        else Ahead(source, "train"),
        algorithm,
        objective_of(source.kind, is_uneven(source, train_source)),
        plan,
        planned_for,
        programs.make(gradient_program, "meta-steps", "compile"),
        programs.made(advance_program, "steps of the model", "compile", plan),
        programs.make(trace_program, "evaluations", "evaluate"),
        programs.make(outputs_program, "evaluations", "evaluate") if algorithm.outputs else None,
        programs.recheck,
        programs.chunks,
        identity_of(source),
        str(batch_norm or "not stated by the backbone"),
        _parameters(algorithm, network),
    )


def seed_of_weights(seed: int) -> int:
    """What torch's generator gets for a run's seed: the seed, or a digest of a large one.

    On the CPU torch takes the lowest 32 bits only, so `2**32` would draw the weights of 0.
    """
    return seed if seed < 2**32 else stream_key("weights", seed) % 2**32


def _parameters(algorithm: Algorithm, network: Network) -> dict[str, int | None]:
    """How many parameters are learned, adapted and frozen (None: the algorithm does not say).

    Raises:
        ConfigError: the algorithm would learn frozen parameters.
    """
    meta = algorithm.init()
    if stirred := [name for name in meta if name in network.frozen]:
        raise ConfigError(
            f"the algorithm learns {stirred[0]}, which the backbone has frozen by "
            "requires_grad=False: start from detached_parameters(model) of "
            "metarun.components.algo.base"
        )
    sizes = {name: p.numel() for name, p in meta.items() if name not in algorithm.kept}
    hyper = sum(size for name, size in sizes.items() if name.startswith(HYPERPARAMETERS))
    # What is made anew in each task, a context or a head, is no parameter of the run.
    adapted = [meta[name].numel() for name in algorithm.adapted or () if name in meta]
    return {
        "learned": sum(sizes.values()) - hyper if algorithm.learns else 0,
        "hyperparameters": hyper if algorithm.learns else 0,
        "adapted": sum(adapted) if adapted else None,
        "frozen": sum(p.numel() for p in network.frozen.values()),
    }


def _check_size(config: TrainConfig, source: EpisodeSource) -> None:
    """Refuse tasks of which a batch is larger than the memory of the machine."""
    task, size = config.task, max(config.trainer.meta_batch, config.engine.fixed_chunk or 0)
    classes = source.kind == "classification"
    shapes = (task, task.in_training())
    examples = max(t.support + t.query * t.way if classes else t.shot + t.query for t in shapes)
    needed = size * examples * math.prod(source.input_shape) * 8
    if needed > machine_memory():
        raise ConfigError(
            f"{size} tasks of {examples} examples each are {needed / 2**30:.0f} GiB, more than "
            "the memory of this machine: lower trainer.meta_batch, engine.chunk or task.query"
        )


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """A config as plain values, for config.yaml and checkpoints."""
    return asdict(config)


def from_plain(plain: dict[str, Any]) -> TrainConfig:
    """The config that `to_plain` wrote, checked again; components are looked up by name.

    Raises:
        CheckpointError: it names a component that is not there, has unknown settings or values
            that are not allowed.
    """
    try:
        parts: dict[str, Any] = {}
        for group in GROUPS:
            settings = plain.get(group)
            name = settings.get("name") if isinstance(settings, dict) else None
            if not isinstance(name, str):
                raise ConfigError(f"it names no {group}")
            if name not in schemas(group):
                raise CheckpointError(
                    f"the checkpoint needs {group}={name[:80]}, unknown here{_hint(plain)}"
                )
            parts[group] = read(group, schemas(group)[name], settings)
        task = dict(plain["task"]) if isinstance(plain.get("task"), dict) else plain.get("task")
        if isinstance(task, dict):  # an older one has a single shape
            task["train"] = read("task.train", TrainTaskConfig, task.get("train", {}))
        parts["task"] = read("task", TaskConfig, task)
        parts["augment"] = read("augment", AugmentConfig, plain.get("augment", {}))
        parts["trainer"] = read("trainer", TrainerConfig, plain.get("trainer"))
        parts["engine"] = read("engine", EngineConfig, plain.get("engine"))
        return read("the config", TrainConfig, plain | parts)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's config cannot be read: {error}") from error


def _hint(plain: dict[str, Any]) -> str:
    """What to type for a component that came with a plugin, if the config says which."""
    plugins = plain.get("plugins")
    if not fits(plugins, list[str]) or not plugins:
        return ""
    return f": give +plugins=[{', '.join(plugins)[:200]}], as in training"
