"""One checkpoint under several evaluation protocols, on the same tasks.

The first protocol is that of the run. Each other one changes a setting of it, or two. What it
changes in a score is taken task by task, where the tasks are the same:

    d_i = score on task i under the other protocol − that under the first
    difference = mean of d_i ± t·s/√n, with the standard deviation s of d_i over n tasks
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarun.components.backbone.norm import BatchNorm
from metarun.components.formats import without_gpu
from metarun.config.changes import changed
from metarun.config.run import TrainConfig
from metarun.config.trained import (
    EvalAlgo,
    EvalBackbone,
    EvalConfig,
    EvalData,
    EvalTask,
    SensitivityConfig,
)
from metarun.episodes.reordered import Reordered
from metarun.errors import ConfigError, DataError
from metarun.inference.evaluate import build_evaluated, default_tasks
from metarun.rundir import checkpoint
from metarun.training.data_check import check_evaluated
from metarun.training.device import choose_device
from metarun.training.evaluation import confidence95, evaluate, sources_of
from metarun.training.setup import Setup, from_plain
from metarun.training.state import restore_meta

NORM, QUERY, STEPS = "backbone.norm", "task.query", "algo.eval_inner_steps"
SAME = 4  # tasks whose support sets are compared
ROTATIONS, ORDERS, TASKS = "data.rotations", "label orders", "tasks"


@dataclass(frozen=True)
class Row:
    """A protocol and what it gives.

    Attributes:
        changes: what of it is not as in the first row, by the setting; those that are none have
            names of their own: "label orders" other orders of a task's classes, of which a task's
            score is the mean, and the first so many "tasks" alone.
        score: mean over the tasks; NaN where the protocol is impossible.
        ci95: half-width of its 95 % interval.
        tasks: how many.
        difference: from the first row; NaN where there is none.
        difference_ci95: half-width of its 95 % interval.
        paired: whether it is over differences of the same tasks.
        spread: of "label orders", the standard deviation of a task's score over its orders.
        reason: why the protocol is impossible; empty: it is not.
    """

    changes: dict[str, Any]
    score: float = math.nan
    ci95: float = math.nan
    tasks: int = 0
    difference: float = math.nan
    difference_ci95: float = math.nan
    paired: bool = False
    spread: float = math.nan
    reason: str = ""


class Evaluated:
    """A checkpoint that can be scored under one protocol after the other.

    Attributes:
        path: of the checkpoint.
        content: what it holds.
        base: the run as it was tested.
        tasks: how many each protocol is scored on.
    """

    def __init__(self, config: SensitivityConfig) -> None:
        """Find the checkpoint, and its data.

        Raises:
            ConfigError: there is no such run, or its data are fixed tasks or no tasks.
            DataError: the data are missing or damaged.
            CheckpointError: the checkpoint is damaged.
        """
        self.config = config
        self.path = checkpoint.find(config.ckpt)
        self.content = checkpoint.load(self.path)
        self.trained = from_plain(self.content["config"])
        self.device = choose_device(config.device)
        self.base = self._setup({})
        check_evaluated(self.base, self.content, self.trained, self._asked({}))
        if self.base.algorithm.one_model is not None:
            raise ConfigError(
                f"algo={self.trained.algo.name} trains one model, which adapts to no tasks: "
                "`metarun eval` evaluates it"
            )
        self.tasks = config.episodes or default_tasks(self.trained, config.split)

    def scores(
        self, changes: dict[str, Any], on_progress: Callable[[int], None]
    ) -> tuple[Tensor, bool, float]:
        """Score the tasks under a protocol.

        Returns:
            float64 (tasks,), whether the tasks have the support sets of the first protocol, and
            the spread over orders of the classes (NaN without such).

        Raises:
            ConfigError: the run cannot be evaluated so.
            DataError: the data are too few for it.
        """
        orders = changes.get(ORDERS)
        setup = self._setup(changes)
        if orders is None:
            return self._evaluated(setup, None, on_progress), self._is_same(setup), math.nan
        found = [self._evaluated(setup, order, on_progress) for order in range(1, orders + 1)]
        each = torch.stack(found)
        spread = float(each.var(0).mean().sqrt()) if orders > 1 else math.nan
        return each.mean(0), True, spread

    def _is_same(self, setup: Setup) -> bool:
        """Whether the support sets of its first tasks are those of the first protocol."""
        here, there = (
            source.sample(self.config.split, 0, SAME)[:2]
            for source in (self.base.source, setup.source)
        )
        return all(torch.equal(a, b) for a, b in zip(here, there, strict=True))

    def _evaluated(
        self, setup: Setup, order: int | None, on_progress: Callable[[int], None]
    ) -> Tensor:
        source = setup.source if order is None else Reordered(setup.source, order)
        found = evaluate(
            setup.trace,
            setup.objective,
            restore_meta(setup, self.content),
            source,
            self.config.split,
            self.tasks,
            setup.config.engine.fixed_chunk,
            on_progress,
        )
        return found.scores[:, -1]

    def _asked(self, changes: dict[str, Any]) -> EvalConfig:
        own = self.config
        more = {"data": {"rotations": changes[ROTATIONS]}} if ROTATIONS in changes else {}
        return EvalConfig(
            own.ckpt,
            own.split,
            device=own.device,
            task=EvalTask(query=changes.get(QUERY)),
            algo=EvalAlgo(changes.get(STEPS)),
            backbone=EvalBackbone(changes.get(NORM)),
            engine=own.engine,
            data=EvalData(root=own.data.root, download=own.data.download),
            more=more,
        )

    def _setup(self, changes: dict[str, Any]) -> Setup:
        config = without_gpu(self.trained, changed(self.trained, self._asked(changes)), self.device)
        return build_evaluated(config, self.device, self.content, self.config.split)


def protocols(base: Setup, config: SensitivityConfig) -> list[dict[str, Any]]:
    """What each protocol but the first changes.

    Each setting is changed alone, and the moments of batch normalisation together with the number
    of queries, which share them.
    """
    settings = _settings(base, config)
    alone = [{key: value} for key, values in settings.items() for value in values]
    both = product(settings.get(NORM, ()), settings.get(QUERY, ()))
    return alone + [{NORM: norm, QUERY: query} for norm, query in both]


def _settings(base: Setup, config: SensitivityConfig) -> dict[str, list[Any]]:
    """Setting -> the values that the run was not tested with."""
    run, found = base.config, dict[str, list[Any]]()
    classes = base.source.kind == "classification"
    if any(isinstance(part, BatchNorm) for part in base.model.modules()) and classes:
        own = vars(run.backbone).get("norm")
        # Moving averages exist where they were trained.
        found[NORM] = [n for n in config.norms if n not in (own, "running")] if own else []
    found[QUERY] = [n for n in config.queries if n != run.task.query]
    if (steps := vars(run.algo).get("eval_inner_steps")) is not None:
        found[STEPS] = [n for n in config.inner_steps if n != steps]
    if config.label_orders and classes and _is_even(run):
        found[ORDERS] = [config.label_orders]
    if config.rotations and isinstance(own := vars(run.data).get("rotations"), bool):
        found[ROTATIONS] = [not own]
    return found


def _is_even(config: TrainConfig) -> bool:
    return config.task == config.task.even()


def measure(
    run: Evaluated, on_progress: Callable[[int], None] = lambda done: None
) -> Iterator[Row]:
    """Score each protocol, the run's own first.

    Args:
        run: the checkpoint.
        on_progress: called with the tasks that were done of all `to_do`.

    Yields:
        A row for each, as soon as it is there; then one for each smaller number of tasks.
    """
    done = 0

    def advance(tasks: int) -> None:
        on_progress(done + tasks)

    first, _, _ = run.scores({}, advance)
    turns = sources_of(run.base.source)
    own = Row({}, float(first.mean()), confidence95(first, turns), len(first))
    yield own
    done += run.tasks
    for changes in protocols(run.base, run.config):
        yield _compared(run, changes, own, first, advance)
        done += run.tasks * changes.get(ORDERS, 1)
        on_progress(done)
    for count in run.config.fewer:
        if count < run.tasks:
            part = first[:count]
            yield Row({TASKS: count}, float(part.mean()), confidence95(part, turns), count)


def to_do(run: Evaluated) -> int:
    """How many tasks `measure` evaluates."""
    others: list[int] = [c.get(ORDERS, 1) for c in protocols(run.base, run.config)]
    return run.tasks * (1 + sum(others))


def _compared(
    run: Evaluated,
    changes: dict[str, Any],
    own: Row,
    first: Tensor,
    advance: Callable[[int], None],
) -> Row:
    try:
        scores, paired, spread = run.scores(changes, advance)
    except (ConfigError, DataError) as error:
        return Row(changes, reason=str(error))
    turns = sources_of(run.base.source)
    half = confidence95(scores, turns)
    row = Row(changes, float(scores.mean()), half, len(scores), spread=spread)
    apart = confidence95(scores - first, turns) if paired else math.hypot(row.ci95, own.ci95)
    return replace(row, difference=row.score - own.score, difference_ci95=apart, paired=paired)


def described(run: Evaluated, rows: list[Row]) -> dict[str, Any]:
    """The rows as plain values, with what they are of."""
    base = run.base
    return {
        "ckpt": str(Path(run.path)),
        "step": run.content["step"],
        "split": run.config.split,
        "score": base.objective.score_name,
        "algo": base.config.algo.name,
        "data": base.config.data.name,
        "data_identity": base.identity,
        "seed": base.config.seed,
        "rows": [_without_nan(vars(row)) for row in rows],
    }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }
