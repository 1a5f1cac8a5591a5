"""Whether settings, algorithm and data fit together: checked before a run begins."""

from dataclasses import asdict, fields

import torch
from torch import nn

from metarun.components.algo.base import Algorithm, evaluating
from metarun.components.backbone.norm import counting
from metarun.components.network import untouched
from metarun.config.augment import COLOURS, OF_COLOUR
from metarun.config.run import TrainConfig, flat
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.source import EpisodeSource, an_episode
from metarun.errors import ConfigError

PROBED = 4  # examples by which a network is tried


def check_kind_of_data(config: TrainConfig, algorithm: Algorithm, source: EpisodeSource) -> None:
    """Refuse labelled examples for an algorithm that solves tasks, and tasks for one model.

    Raises:
        ConfigError: says which data to choose.
    """
    name, data = config.algo.name, config.data.name
    if isinstance(source, LabelledExamples) and algorithm.one_model is None:
        raise ConfigError(
            f"data={data} has labelled examples and no tasks, and algo={name} learns from tasks: "
            "choose data=glyphs or data=omniglot, or algo=look_ahead or algo=supervised"
        )
    if algorithm.one_model is not None and not isinstance(source, LabelledExamples):
        raise ConfigError(
            f"data={data} has tasks, and algo={name} trains one classifier on labelled examples: "
            "choose data=glyphs_examples or data=omniglot_examples"
        )


def check_fits(
    config: TrainConfig,
    algorithm: Algorithm,
    source: EpisodeSource,
    train_source: EpisodeSource,
) -> None:
    """Refuse settings that an algorithm has no use for, and tasks that it cannot do.

    Raises:
        ConfigError: names the setting.
    """
    name = config.algo.name
    if algorithm.one_model is not None:
        _check_one_model(config)
    if not algorithm.learns and config.task.in_training() != config.task:
        raise ConfigError(
            f"task.train: algo={name} meta-learns nothing, and has no training tasks; leave it out"
        )
    if not algorithm.any_way and train_source.outputs != source.outputs:
        raise ConfigError(
            f"task.train.way={train_source.outputs}: algo={name} learns a network that tells "
            f"task.way={source.outputs} classes apart; leave it out, or choose an algorithm "
            "without a head of its own, such as protonet or r2d2"
        )
    if (uneven := _uneven(config)) is not None and not algorithm.uneven:
        other = algorithm.uneven_with
        raise ConfigError(
            f"{uneven}: algo={name} does not leave out what pads uneven tasks; leave it out, or "
            + (f"give {other}, or " if other else "")
            + "choose an algorithm that does, such as protonet, r2d2 or maml"
        )
    if algorithm.batch_size is not None and config.task.in_training() != config.task:
        raise ConfigError(
            f"task.train: algo={name} learns from plain batches, and has no training tasks; leave "
            "it out"
        )
    if not algorithm.differentiates and config.engine.gradient != "auto":
        what = "differentiates nothing through its inner steps"
        if not algorithm.has_inner_loop:
            what = "has no inner loop to differentiate"
        raise ConfigError(
            f"engine.gradient={config.engine.gradient}: algo={name} {what}; leave it out"
        )
    if algorithm.has_inner_loop:
        return
    inner = config.inner_opt
    if inner.learn or inner.groups or inner.name != "sgd":
        key = "learn" if inner.learn else "groups" if inner.groups else "name"
        shown = f"inner_opt={inner.name}" if key == "name" else f"inner_opt.{key}"
        raise ConfigError(f"{shown}: algo={name} has no inner loop; leave inner_opt out")
    plain = type(inner)()
    for field in fields(plain):
        tuned = field.name == "lr" and source.kind == "regression"  # by the data's own defaults
        value = getattr(inner, field.name)
        if value != getattr(plain, field.name) and not tuned:
            raise ConfigError(
                f"inner_opt.{field.name}={value}: algo={name} has no inner loop; leave it out"
            )


def check_augment(config: TrainConfig, algorithm: Algorithm, source: EpisodeSource) -> None:
    """Refuse augmentation of what is no picture, or of nothing, and halves that are not there.

    Raises:
        ConfigError: names the setting.
    """
    augment, algo = config.augment, config.algo.name
    if not augment.on:
        return
    if not algorithm.learns:
        raise ConfigError(
            f"augment.{augment.on[0]}: algo={algo} meta-learns nothing, and has no training tasks; "
            "leave it out"
        )
    check_pictures(config, source)
    if algorithm.batch_size is not None:
        for half in ("support", "query"):
            if getattr(augment, half) is not None:
                raise ConfigError(
                    f"augment.{half}: algo={algo} learns from plain batches, which have no support "
                    "and queries; leave it out, and all their pictures are augmented"
                )


def check_pictures(config: TrainConfig, source: EpisodeSource) -> None:
    """Refuse augmentation that the examples of a source cannot have.

    Raises:
        ConfigError: names the setting.
    """
    augment, data, shape = config.augment, config.data.name, tuple(source.input_shape)
    if not augment.on:
        return
    first = f"augment.{augment.on[0]}"
    if isinstance(source, LabelledExamples):
        raise ConfigError(
            f"{first}: data={data} has labelled examples, and the pictures of tasks and of plain "
            "batches alone are augmented; leave it out"
        )
    if source.kind != "classification" or len(shape) != 3:
        raise ConfigError(f"{first}: data={data} has no pictures to augment; leave it out")
    border = augment.crop or 0
    if border >= min(shape[1:]):
        raise ConfigError(
            f"augment.crop={border}: the pictures have {shape[1]}×{shape[2]} pixels; it must be "
            "less"
        )
    colours = [name for name in augment.on if name in COLOURS]
    if colours and shape[0] not in (1, 3):
        raise ConfigError(
            f"augment.{colours[0]}: the examples of data={data} have {shape[0]} channels: it is "
            "for colour pictures and grey ones; leave it out"
        )
    if shape[0] == 1 and (of_colour := [name for name in colours if name in OF_COLOUR]):
        raise ConfigError(
            f"augment.{of_colour[0]}: the pictures of data={data} are grey and have no colours; "
            "leave it out"
        )
    values = an_episode(source).support_x
    if float(values.min()) < 0 or float(values.max()) > 1:
        raise ConfigError(
            f"{first}: the examples of data={data} have values from {float(values.min()):g} to "
            f"{float(values.max()):g}: augmentation is for pictures from 0 (black) to 1 (white)"
        )


def _uneven(config: TrainConfig) -> str | None:
    """The setting that makes tasks uneven, as it is typed; None: they have one shape."""
    if config.task.uneven is not None:
        return f"task.{config.task.uneven}"
    trained = config.task.in_training().uneven
    return None if trained is None else f"task.train.{trained}"


def refuse_mixing(config: TrainConfig, model: nn.Module, source: EpisodeSource) -> None:
    """Refuse a network whose outputs for some examples depend on those that pad a task.

    It is called with some examples alone, and with others beside them that do not count.

    Raises:
        ConfigError: the outputs differ.
    """
    x = an_episode(source).support_x[0][:PROBED]
    others = 1 + 2 * x.flip(0)
    which = torch.arange(2 * len(x), device=x.device) < len(x)
    with untouched(model), evaluating(model), torch.no_grad():
        alone = model(x)
        with counting(which):
            beside = model(torch.cat([x, others]))[: len(x)]
    scale = float(alone.abs().max())
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
        raise ConfigError(
            f"{_uneven(config)}: what backbone={config.backbone.name} gives for an example depends "
            "on those that pad an uneven task, as that of torch's own batch normalisation does; "
            "use metarun.components.backbone.norm.BatchNorm, or leave it out"
        )


def _check_one_model(config: TrainConfig) -> None:
    """Refuse settings of tasks, of which there are none where one model is trained.

    Raises:
        ConfigError: names the setting.
    """
    name, one = config.algo.name, "trains one model, and has no tasks"
    given, plain = flat(asdict(config.task)), flat(asdict(type(config.task)()))
    if changed := [key for key, value in given.items() if value != plain[key]]:
        key = changed[0]
        raise ConfigError(f"task.{key}={given[key]}: algo={name} {one}; leave it out")
    if (size := config.trainer.meta_batch) != 1:
        raise ConfigError(
            f"trainer.meta_batch={size}: algo={name} trains one model, one step after the other; "
            "trainer.meta_batch=1 is all that it takes"
        )
    if (members := config.trainer.ensemble) is not None:
        raise ConfigError(
            f"trainer.ensemble={members}: algo={name} trains one model, whose checkpoints are not "
            "tested together; leave it out"
        )
    for key in ("chunk", "batching"):
        value = getattr(config.engine, key)
        if value not in (None, "auto", "loop"):
            raise ConfigError(
                f"engine.{key}={value}: algo={name} {one} to be computed together; leave it out"
            )
