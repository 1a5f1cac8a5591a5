"""Ordinary supervised training of one classifier: the control of what learns how to train one."""

from contextlib import nullcontext
from typing import Any, ClassVar

from metarun.components.algo.base import Algorithm, OneModel, Problem
from metarun.components.algo.one_model import OneModelConfig, classifier
from metarun.components.backbone.norm import Seen, collecting
from metarun.config.component import builds, settings
from metarun.episodes.examples import ExampleBatches
from metarun.episodes.source import Batch
from metarun.unroll import Meta


@settings
class SupervisedConfig(OneModelConfig):
    """Ordinary training of one classifier on labelled examples, by the outer optimizer."""

    of_training: ClassVar[tuple[str, ...]] = ("held_out",)

    held_out: bool = False  # whether it learns from the examples that are held out as well


@builds(SupervisedConfig)
def supervised(problem: Problem, own: SupervisedConfig) -> Algorithm:
    """Minimise the cross entropy of random batches of labelled examples.

    Nothing is meta-learned: a meta-step is a step of the outer optimizer on one batch. It is a
    control of `look_ahead`, which takes the same batches. With `held_out` it learns from all
    examples that `look_ahead` has: of noisy labels, from the clean ones too.

    Args:
        problem: a classification of labelled examples.
        own: the settings.

    Raises:
        ValueError: as `classifier`.
    """
    model, objective = classifier(problem, "supervised"), problem.objective
    averages = model.normalising

    def loss(meta: Meta, batch: Batch) -> tuple[Any, dict[str, Any]]:
        with collecting() if averages.kept else nullcontext(Seen()) as seen:
            outputs = model.outputs({name: meta[name] for name in model.start}, batch.x)
        value = objective.loss(outputs, batch.y)
        extra: dict[str, Any] = {"loss": value, "score": objective.score(outputs, batch.y)}
        return value, extra | {"kept": averages.updated(meta, seen) if averages.kept else {}}

    parts = ("train", "held_out") if own.held_out else ("train",)
    return Algorithm(
        init=lambda: model.start | averages.init(),
        loss=loss,
        trace=model.trace,
        kept=averages.kept,
        differentiates=False,
        has_inner_loop=False,
        one_model=OneModel(
            lambda examples: ExampleBatches(examples, parts, own.batch_size), own.batch_size
        ),
    )
