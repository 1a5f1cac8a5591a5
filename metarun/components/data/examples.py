"""Data sets of labelled examples, without tasks: one classifier is trained on them."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import as_keywords, settings
from metarun.config.run import TaskConfig
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.store import ClassStore


@settings
class ExamplesConfig:
    """What data sets of labelled examples have: the classes, and what their examples are for."""

    # Other values would put into an evaluation what the model has learned from.
    of_run: ClassVar[tuple[str, ...]] = ("classes", "held_out", "val", "test", "label_noise")

    name: str = "???"
    classes: int | None = 50  # that one classifier tells apart, always the same ones; null: all
    held_out: int = 4  # examples of each class that a meta-loss is taken of
    val: int = 2  # examples of each class that choose the model
    test: int = 4  # examples of each class that give its figure; the rest is to learn from
    label_noise: float = 0.0  # fraction of the training labels that are of another class, by seed

    def __post_init__(self) -> None:
        if self.classes is not None:
            between("data.classes", self.classes, 2, MOST_UNITS)
        for part in ("held_out", "val", "test"):
            between(f"data.{part}", getattr(self, part), 1, MOST_UNITS)
        between("data.label_noise", self.label_noise, 0, 1)


def labelled_examples(load: Callable[..., ClassStore]) -> Callable[..., LabelledExamples]:
    """What builds the labelled examples of a data set of images, from what loads it.

    Args:
        load: `load(**settings)` gives all images, by the settings that `ExamplesConfig` has not.

    Returns:
        `build(task, seed, device, dtype, own)`, as a component's.
    """

    def build(
        task: TaskConfig,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        own: ExamplesConfig,
    ) -> LabelledExamples:
        given: dict[str, Any] = as_keywords(own)
        divided = {key: given.pop(key) for key in ExamplesConfig.of_run}
        return LabelledExamples(load(**given), **divided, seed=seed, device=device, dtype=dtype)

    return build
