"""From episodes to a figure with its uncertainty."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarun.components.algo.base import Objective, Trace
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.source import EpisodeSource
from metarun.rundir.interval import deviation_within, half_width95
from metarun.system.ranks import ALONE, Ranks
from metarun.training.setup import Setup
from metarun.unroll import Meta

TASKS_AT_A_TIME, ON_A_CPU = 128, 16  # an accelerator wants many, a CPU's caches hold few


@dataclass(frozen=True)
class Evaluation:
    """Scores of many tasks.

    Attributes:
        objective: tells what the score is.
        each: what has a score of its own: "task", or "example" where one model is evaluated.
        scores: float64 (tasks, inner steps + 1), from before the first inner step.
        losses: likewise, the query loss.
        sources: of the tasks, which take turns.
    """

    objective: Objective
    scores: Tensor
    losses: Tensor
    each: str = "task"
    sources: int = 1

    @property
    def score(self) -> float:
        """Mean over tasks after the last inner step."""
        return float(self.scores[:, -1].mean())

    @property
    def ci95(self) -> float:
        """Half-width of the 95 % confidence interval of `score`."""
        return confidence95(self.scores[:, -1], self.sources)

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON file; keys carry the name of the score."""
        name = self.objective.score_name
        return {
            name: self.score,
            "ci95": self.ci95,
            "episodes" if self.each == "task" else "examples": self.scores.shape[0],
            "inner_steps": self.scores.shape[1] - 1,
            f"{name}_per_inner_step": self.scores.mean(dim=0).tolist(),
            "ci95_per_inner_step": [confidence95(column, self.sources) for column in self.scores.T],
            "loss_per_inner_step": self.losses.mean(dim=0).tolist(),
            f"{name}_per_{self.each}": self.scores[:, -1].tolist(),
        }

    def by_turns(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The figures of each source, where task `i` is of source `i` modulo their number."""
        found = {}
        for place, name in enumerate(names[: len(self.scores)]):
            scores, losses = (whole[place :: len(names)] for whole in (self.scores, self.losses))
            whole = Evaluation(self.objective, scores, losses).summary()
            kept = (self.objective.score_name, "ci95", "episodes")
            found[name] = {key: whole[key] for key in kept}
        return found


def confidence95(values: Tensor, sources: int = 1) -> float:
    """Half-width of the 95 % confidence interval of the mean of independent values.

    Args:
        sources: that they come from in turn (`deviation_within`).
    """
    count = values.numel()
    if sources > 1 and count > 1:
        return half_width95(deviation_within(values.double().tolist(), sources), count, sources)
    return half_width95(float(values.double().std()) if count > 1 else 0.0, count)


def sources_of(source: EpisodeSource) -> int:
    """How many sources the evaluated tasks come from in turn."""
    return len(getattr(source, "names", ())) or 1


def evaluate(
    trace: Callable[[Meta, Any], Trace],
    objective: Objective,
    meta: Meta,
    source: EpisodeSource,
    split: str,
    episodes: int,
    chunk: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Adapt to episodes 0 … `episodes - 1` of a split and score the queries; or score examples.

    The ranks take turns at whole chunks, so that the figures have the bits that one rank alone
    would find.

    Args:
        trace: `trace(meta, tasks)` gives the traces of a batch of tasks.
        chunk: tasks at a time.
        on_progress: called with the number of tasks done, now and then, as often on every rank;
            may raise to stop.

    Returns:
        The scores of all tasks, on every rank.

    Raises:
        LostRank: another rank is gone.
    """
    like = next(iter(meta.values()), torch.empty(0))  # what learns nothing may have none
    size = chunk or (ON_A_CPU if like.device.type == "cpu" else TASKS_AT_A_TIME)
    traces: dict[int, Trace] = {}  # by the first task of the chunk
    with torch.no_grad():
        for turn in range(0, episodes, size * ranks.count):
            start = turn + size * ranks.rank
            if start < episodes:
                tasks = source.sample(split, start, min(size, episodes - start))
                traces[start] = trace(meta, tasks)
            on_progress(min(turn + size * ranks.count, episodes))
    own = {start: [part.double().cpu() for part in trace] for start, trace in traces.items()}
    by_start = {start: trace for found in ranks.gather(own) for start, trace in found.items()}
    losses, scores = zip(*(by_start[start] for start in sorted(by_start)), strict=True)
    each = "example" if isinstance(source, LabelledExamples) else "task"
    return Evaluation(objective, torch.cat(scores), torch.cat(losses), each, sources_of(source))


def evaluate_split(
    setup: Setup,
    trace: Callable[[Meta, Any], Trace],
    meta: Meta,
    split: str,
    tasks: int,
    on_progress: Callable[[int], None],
) -> Evaluation:
    """Score tasks of a split; where one model is trained, all examples of that part.

    Args:
        trace: as of `evaluate`: of `setup`, or of several checkpoints together.
        tasks: how many, where there are tasks.
        on_progress: as of `evaluate`.

    Raises:
        LostRank: another rank is gone.
    """
    chunk, one = setup.config.engine.fixed_chunk, setup.algorithm.one_model
    if one is not None and isinstance(setup.source, LabelledExamples):
        tasks, chunk = setup.source.count(split), one.batch_size
    return evaluate(
        trace,
        setup.objective,
        meta,
        setup.source,
        split,
        tasks,
        chunk,
        on_progress,
        setup.ranks,
    )


def format_score(name: str, value: float | None) -> str:
    """Accuracies in per cent, errors as they are; "?" where there is no figure."""
    if value is None or math.isnan(value):
        return "?"
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"
