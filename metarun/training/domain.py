"""Evaluation on data that nothing is trained on: of another kind than a run's, or a split alone."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from metarun.components.build import build_data
from metarun.config.run import TaskConfig, TrainConfig
from metarun.episodes.source import (
    EpisodeSource,
    ImageEpisodes,
    TooFew,
    splits_of,
    training_classes,
)
from metarun.episodes.uneven import uneven_of
from metarun.errors import ConfigError

LEAST = TaskConfig(way=2, shot=1, query=1)
"""Tasks that any data have."""

KEY = "examples"
"""Of checkpoints: what `examples_of` gives."""


def examples_of(source: EpisodeSource) -> dict[str, Any]:
    """What a network was made for: plain values, kept in a checkpoint.

    Returns:
        kind: "classification" or "regression".
        shape: of an example, such as [1, 28, 28].
        outputs: of the network.
        classes: of the training data, where there are labelled examples of them; else None.
    """
    return {
        "kind": source.kind,
        "shape": [int(size) for size in source.input_shape],
        "outputs": source.outputs,
        "classes": training_classes(source),
    }


@dataclass(frozen=True)
class Domain:
    """The data that a run is evaluated on and could not be trained on: mostly another domain.

    Attributes:
        trained_on: name of the run's data.
        examples: what the checkpoint says of them (`examples_of`); None of an older one.
        fit: whether images may be brought to the shape of those of training.
        invert: whether dark and light change places.
        split: which is evaluated, where the others may be too small for the tasks; None: none may.
    """

    trained_on: str
    examples: dict[str, Any] | None
    fit: bool = False
    invert: bool = False
    split: str | None = None

    @property
    def classes(self) -> int | None:
        """Number of the classes that the run was trained on, if that is known."""
        return None if self.examples is None else self.examples["classes"]

    def source(self, config: TrainConfig, device: torch.device) -> EpisodeSource:
        """The source, if a network of the run can take its examples; brought to them if asked.

        Raises:
            ConfigError: says what differs, and what to type.
        """
        name, task = config.data.name, config.task
        if self.examples is not None and self.examples["kind"] != "classification":
            # Such tasks have a way of 1, which must not hide that the others have classes.
            config = replace(config, task=replace(task, way=2))
        source = _built(config, device, self.split)
        if self.examples is None:
            if self.fit or self.invert:
                raise ConfigError(
                    "data.fit, data.invert: the checkpoint is of an older metarun and does not say "
                    "what its examples were; leave them out"
                )
            return source
        if source.kind != self.examples["kind"]:
            raise ConfigError(
                f"data={name}: its tasks are {source.kind}, and the run was trained on "
                f"{self.examples['kind']} (data={self.trained_on})"
            )
        if source.kind != "classification" and source.outputs != self.examples["outputs"]:
            raise ConfigError(
                f"data={name}: its targets have {source.outputs} numbers, those of "
                f"data={self.trained_on} have {self.examples['outputs']}"
            )
        wanted, found = tuple(self.examples["shape"]), tuple(source.input_shape)
        if self.fit or self.invert:
            if not hasattr(source, "fitted"):
                raise ConfigError(
                    f"data.fit, data.invert: data={name} has no images that could be changed"
                )
            try:
                source = source.fitted(wanted if self.fit else found, self.invert)
            except ValueError as error:
                raise ConfigError(f"data.fit: {error}") from error
        elif wanted != found:
            raise ConfigError(self._refusal(config, wanted, found))
        return source

    def _refusal(self, config: TrainConfig, wanted: tuple[int, ...], found: tuple[int, ...]) -> str:
        name, own = config.data.name, vars(config.data)
        text = (
            f"data={name}: its examples are {_shown(found)}, the run was trained on "
            f"{_shown(wanted)} (data={self.trained_on})"
        )
        if len(wanted) != 3 or len(found) != 3:
            return text
        remedies = []
        if wanted[1:] != found[1:] and "size" in own and wanted[1] == wanted[2]:
            remedies.append(f"data.size={wanted[1]}")
        if wanted[0] != found[0] and "color" in own and wanted[0] in (1, 3):
            remedies.append(f"data.color={'grey' if wanted[0] == 1 else 'rgb'}")
        right = (wanted[1:] == found[1:] or "size" in own) and (
            wanted[0] == found[0] or "color" in own
        )
        by_own = f"give {' '.join(remedies)}, or " if remedies and right else "give "
        return f"{text}: {by_own}data.fit=true, which brings its images to that shape"


def _built(config: TrainConfig, device: torch.device, split: str | None) -> EpisodeSource:
    """The data, of which none are for training, so that a split of them may be one too many.

    Where another split is too small for the tasks, they have the one that is evaluated alone.
    """
    try:
        return build_data(config, device)
    except ConfigError as error:
        if not is_too_small(error):
            raise
        first = error
    try:
        source, task = build_data(replace(config, task=LEAST), device), config.task
        if isinstance(source, ImageEpisodes) and split is not None and split in source.splits:
            shape = task.way, task.shot, task.query, task.within, uneven_of(task)
            return source.alone(split).of_shape(*shape, split=split)
    except ConfigError as error:
        if not is_too_small(error):
            raise
    except ValueError as error:  # of the split that is evaluated
        first = ConfigError(str(error))
    if "fractions" in vars(config.data):
        text = f"{first}; data.fractions=[0,0,1] makes all of them test classes"
        raise ConfigError(text) from first
    raise first


def is_too_small(error: ConfigError) -> bool:
    """Whether a split has too few classes or examples for the tasks."""
    return isinstance(error.__cause__, TooFew)


def refuse_no_training(name: str, source: EpisodeSource) -> None:
    """Refuse to train on data that are for evaluation alone.

    Raises:
        ConfigError: says how they are used.
    """
    if "train" not in splits_of(source):
        raise ConfigError(
            f"data={name} has only {_listed(source)}: train on other data, then "
            f"metarun eval ckpt=… data={name}"
        )


def refuse_other_shape(config: TrainConfig, source: EpisodeSource) -> None:
    """Refuse a shape of tasks that data with fixed tasks do not have.

    Raises:
        ConfigError: says which they have.
    """
    if not hasattr(source, "tasks"):
        return
    for name in ("way", "shot", "query", "within"):
        asked, has = getattr(config.task, name), getattr(source, name)
        if asked != has:
            raise ConfigError(
                f"task.{name}={asked}: the tasks of data={config.data.name} are fixed, with "
                f"task.{name}={has}; leave it out"
            )


def episodes_of(name: str, source: EpisodeSource, split: str, asked: int | None) -> int | None:
    """How many tasks to evaluate on: those asked for, or all where their number is fixed.

    Raises:
        ConfigError: there is no such split, or there are not so many tasks.
    """
    if split not in splits_of(source):
        raise ConfigError(f"split={split}: data={name} has only {_listed(source)}")
    fixed: int | None = getattr(source, "tasks", {}).get(split)
    if fixed is not None and asked not in (None, fixed):
        raise ConfigError(f"episodes={asked}: data={name} has {fixed} tasks; leave it out")
    return asked if fixed is None else fixed


def _listed(source: EpisodeSource) -> str:
    return " and ".join(f"a {split} split" for split in splits_of(source))


def _shown(shape: tuple[int, ...]) -> str:
    sides = "×".join(map(str, shape))
    return f"images of {sides} (channels × height × width)" if len(shape) == 3 else sides
