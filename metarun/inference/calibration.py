"""Probabilities that mean what they say, sets of labels that cover, and "none of these".

All of it is learned from tasks of classes that the run has not trained on, and holds for new tasks
in so far as their classes are drawn like those.

References:
    Guo, Pleiss, Sun and Weinberger 2017, On calibration of modern neural networks (temperature;
    expected calibration error, section 2).
    Sadinle, Lei and Wasserman 2019, Least ambiguous set-valued classifiers (the label sets).
    Lee, Barber and Willett 2023, Distribution-free inference with hierarchical data (classes, not
    queries, are exchangeable).
    Hendrycks et al. 2022, Scaling out-of-distribution detection for real-world settings (the
    largest score tells of unknown classes).
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from metarun.rundir.interval import half_width95

BINS = 15  # of confidence, as Guo et al.
SLACK = 1e-9  # of a sum of weights, for its rounding
LEAST_LOG = -100.0  # of a probability in the fit: a single zero would decide it
LOG_TEMPERATURES = (-6.0, 6.0)
"""Within which the fit looks, of the temperature in units of how far scores are below the
largest of their query. Beyond, probabilities are those of a guess, or all but 0 and 1."""


class Bin(NamedTuple):
    """Predictions whose confidence, the probability of their label, lies in (low, high].

    Attributes:
        predictions: how many there are.
        confidence: their mean confidence; NaN where there are none.
        accuracy: the fraction of them that is right; likewise.
    """

    low: float
    high: float
    predictions: int
    confidence: float
    accuracy: float


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """The T for which softmax(scores / T) has the least cross entropy (Guo et al., equation 9).

    Args:
        scores: (…, way), of any scale.
        labels: int64 (…).
    """
    flat, truth = scores.double().flatten(0, -2), labels.flatten()
    below = flat.amax(1, keepdim=True) - flat
    spread = float(below[below.isfinite()].mean())
    if not 0 < spread < math.inf:
        return 1.0  # scores that are all the same say nothing at any temperature
    flat = flat / spread

    def cross_entropy(log_temperature: float) -> float:
        logs = (flat / math.exp(log_temperature)).log_softmax(1).clamp_min(LEAST_LOG)
        return float(-logs.gather(1, truth[:, None]).mean())

    found = minimize_scalar(cross_entropy, bounds=LOG_TEMPERATURES, method="bounded")
    return spread * math.exp(float(found.x))


def reliability(probabilities: Tensor, labels: Tensor) -> list[Bin]:
    """How often predictions of each confidence are right, in `BINS` bins of equal width.

    Args:
        probabilities: (…, way).
        labels: int64 (…).
    """
    confidence, label = probabilities.double().flatten(0, -2).max(1)
    right = (label == labels.flatten()).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    counts = torch.bincount(place, minlength=BINS)
    sums = [torch.bincount(place, values, minlength=BINS) for values in (confidence, right)]
    means = [(total / counts).tolist() for total in sums]
    rows = zip(counts.tolist(), *means, strict=True)
    return [Bin(n / BINS, (n + 1) / BINS, *row) for n, row in enumerate(rows)]


def calibration_error(bins: list[Bin]) -> float:
    """The expected calibration error: mean |accuracy − confidence| of the bins, by their counts."""
    total = sum(one.predictions for one in bins)
    return (
        sum(one.predictions * abs(one.accuracy - one.confidence) for one in bins if one.predictions)
        / total
    )


def class_quantile(values: Tensor, classes: Tensor, level: float) -> float:
    """A bound that a value of a new class exceeds with a probability of 1 − level or less.

    With classes exchangeable, and values within a class as well, that holds for the quantile of
    the values in which each of K classes weighs 1 / (K + 1), and ∞ weighs the rest (Lee, Barber and
    Willett 2023, hierarchical conformal prediction). Thousands of tasks of the same few classes
    tell little of a new class: the quantile of all values alike would promise more than it keeps.

    Args:
        values: of any shape, one for each query.
        classes: int64, likewise: the number of the query's class.
        level: above 0 and below 1.

    Returns:
        Infinity where there are fewer classes than `classes_needed`.
    """
    ordered, order = values.double().flatten().sort()
    _, number, count = torch.unique(classes.flatten(), return_inverse=True, return_counts=True)
    weights = 1 / ((len(count) + 1) * count[number[order]].double())
    reached = (weights.cumsum(0) >= level - SLACK).nonzero()
    return float(ordered[reached[0, 0]]) if len(reached) else math.inf


def classes_needed(level: float) -> int:
    """With how many classes K `class_quantile` has a finite bound: K / (K + 1) is the level."""
    return math.ceil((level - SLACK) / (1 - level + SLACK))


def rate_over_classes(happened: Tensor, classes: Tensor) -> tuple[float, float]:
    """How often something happens to a query, and half of its 95 % confidence interval.

    Queries of one class depend on each other, so the interval is over classes: with n_c queries of
    class c, s_c of which it happens to, and the rate p = Σ s_c / Σ n_c, it is that of the mean of
    K·(s_c − p·n_c) / Σ n_c over the K classes (a ratio estimate; Cochran 1977, section 6.4).

    Args:
        happened: bool, of any shape, one for each query.
        classes: int64, likewise: the number of the query's class.

    Returns:
        The rate and the half width.
    """
    _, number = torch.unique(classes.flatten(), return_inverse=True)
    counts = torch.bincount(number).double()
    sums = torch.bincount(number, happened.flatten().double())
    rate = float(sums.sum() / counts.sum())
    parts = len(counts) * (sums - rate * counts) / counts.sum()
    return rate, half_width95(float(parts.std()), len(parts))


def misfit(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 − the probability of the true label, (tasks, queries)."""
    return 1 - probabilities.gather(-1, labels[..., None])[..., 0]


def label_sets(probabilities: Tensor, bound: float) -> Tensor:
    """Which labels are in the set of each query: those of misfit `bound` or less; bool (…, way).

    A set may be empty: then no label is likely enough.
    """
    return 1 - probabilities <= bound


def strangeness(scores: Tensor) -> Tensor:
    """How little a query looks like any of the classes: minus its largest score, (…)."""
    return -scores.double().amax(-1)


def ranking(known: Tensor, unknown: Tensor) -> float:
    """The probability that an unknown query is stranger than a known one (AUROC); ties are half."""
    ordered = known.flatten().sort().values
    asked = unknown.flatten()
    below = torch.searchsorted(ordered, asked, right=False)
    up_to = torch.searchsorted(ordered, asked, right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))
