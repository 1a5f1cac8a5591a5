"""The interval of an evaluation, also where its tasks come from several sources in turn."""

import math

import numpy as np
import pytest
import torch

from metarun.components.algo.base import OBJECTIVES
from metarun.rundir.interval import deviation_within, half_width95
from metarun.training.evaluation import Evaluation, confidence95


def evaluation(scores: np.ndarray, sources: int) -> Evaluation:
    column = torch.from_numpy(scores)[:, None]
    return Evaluation(OBJECTIVES["classification"], column, column, sources=sources)


@pytest.mark.parametrize("tasks", [60, 61])
def test_sources_in_turn_are_strata(tasks: int) -> None:
    """95 of 100 intervals have the mean of the tasks' own expectations, and are no wider."""
    rng, many, covered, widths = np.random.default_rng(0), 3000, 0, []
    means = np.where(np.arange(tasks) % 2, 0.55, 0.95)
    deviations = np.where(np.arange(tasks) % 2, 0.1, 0.05)
    for _ in range(many):
        found = evaluation(rng.normal(means, deviations), 2)
        covered += abs(found.score - means.mean()) <= found.ci95
        widths.append(found.ci95)
    assert abs(covered / many - 0.95) < 4 * math.sqrt(0.95 * 0.05 / many)
    exact = 2.0 * math.sqrt((deviations**2).sum()) / tasks
    assert np.mean(widths) == pytest.approx(exact, rel=0.02)
    one = evaluation(rng.normal(means, deviations), 1).ci95
    assert one > 2 * np.mean(widths)  # what it was taken for


def test_one_source_has_the_plain_interval() -> None:
    values = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert confidence95(values) == half_width95(float(values.std()), 50)
    listed = values.tolist()
    assert deviation_within(listed) == pytest.approx(float(values.std()), rel=1e-12)
    # Sources of one task each have no spread of their own.
    assert deviation_within(listed[:3], 2) == pytest.approx(float(values[:3].std()))


def test_the_interval_after_each_inner_step_is_of_the_same_kind() -> None:
    found = evaluation(np.tile([0.9, 0.5], 10) + np.linspace(0, 0.01, 20), 2).summary()
    assert found["ci95_per_inner_step"] == [found["ci95"]] and found["ci95"] < 0.01
