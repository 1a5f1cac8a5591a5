"""Where a figure is beside a published one, on figures that are known and on simulated ones."""

import math
from typing import Literal

import pytest
import torch

from metarun.reproduction.rows import Published
from metarun.reproduction.verdict import in_words, verdict


def published(
    value: float, ci95: float | None, score: Literal["accuracy", "mse"] = "accuracy"
) -> Published:
    return Published(score, value, ci95, "95 %, 600 tasks", "A et al. 2017, table 1")


@pytest.mark.parametrize(
    ("value", "interval", "ours", "half", "place", "words"),
    [
        (0.987, 0.004, 0.985, 0.003, "inside", "inside, −0.20 ± 0.50 points (p 0.433)"),
        (0.987, 0.004, 0.991, 0.003, "inside", "inside, +0.40 ± 0.50 points (p 0.117)"),
        (0.987, 0.004, 0.992, 0.003, "above", "above by 0.50 ± 0.50 points (p 0.050)"),
        (0.987, 0.004, 0.977, 0.003, "below", "below by 1.00 ± 0.50 points (p < 0.001)"),
        (0.987, None, 0.977, 0.01, "below", "below by 1.00 ± 1.00 points (p 0.050)"),
        (0.987, None, 0.997, None, "above", "above by 1.00 points"),
        (0.987, 0.01, 0.989, math.nan, "inside", "inside, +0.20 ± 1.00 points (p 0.695)"),
        (0.5, None, 0.5, 0.0, "inside", "inside, +0.00 points"),
        (0.5, None, 0.6, 0.0, "above", "above by 10.00 points"),
    ],
)
def test_a_figure_has_its_place(
    value: float, interval: float | None, ours: float, half: float | None, place: str, words: str
) -> None:
    found = verdict(published(value, interval), ours, half)
    assert (found.place, in_words(found, "accuracy")) == (place, words)
    assert found.difference == pytest.approx(ours - value)


def test_errors_have_no_per_cent() -> None:
    found = verdict(published(0.7, 0.1, "mse"), 0.95, 0.02)
    assert in_words(found, "mse") == "above by 0.25 ± 0.1 (p < 0.001)"


def test_of_equal_methods_one_in_twenty_differs_and_the_interval_has_the_truth() -> None:
    """Each figure is a mean over tasks of its own, of one true value."""
    generator = torch.Generator().manual_seed(0)
    tasks, repeats = {"theirs": 600, "ours": 2000}, 1000
    draws = {
        who: torch.randn(repeats, count, generator=generator, dtype=torch.float64) * 0.08 + 0.9
        for who, count in tasks.items()
    }
    means = {who: values.mean(1) for who, values in draws.items()}
    halves = {who: 1.96 * values.std(1) / tasks[who] ** 0.5 for who, values in draws.items()}
    found = [
        verdict(published(float(f), float(b)), float(m), float(a))
        for f, b, m, a in zip(
            means["theirs"], halves["theirs"], means["ours"], halves["ours"], strict=True
        )
    ]
    covered = sum(abs(one.difference) <= (one.ci95 or 0.0) for one in found) / repeats
    assert 0.93 <= covered <= 0.97
    assert sum((one.p or 0.0) < 0.05 for one in found) / repeats == pytest.approx(1 - covered)
