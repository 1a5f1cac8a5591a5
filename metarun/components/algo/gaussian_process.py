"""A Gaussian process with a constant mean, exactly: its likelihood and its predictions.

In float64, whatever the type of the run: float32 loses a small noise beside a large kernel. There
is no jitter. Where a covariance has no Cholesky factor, all of it becomes NaN, and a run stops.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """Of queries: means (queries, outputs), and the variance of what is observed, (queries,)."""

    mean: Tensor
    variance: Tensor


def marginal_likelihood(
    kernel: Tensor,
    targets: Tensor,
    mean: Tensor,
    noise: Tensor,
    known: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """log N(y; m, K + σ²I), the mean over examples and outputs, ().

    Args:
        kernel: K, (examples, examples).
        targets: y, (examples, outputs): independent processes with the same kernel.
        mean: m, ().
        noise: σ², ().
        known: bool (examples,), which examples count; None: all.
        present: bool (outputs,), which processes count; None: all.
    """
    factor = _factor(kernel, noise, known)
    white = torch.linalg.solve_triangular(factor, _centred(targets, mean, known), upper=False)
    count: int | Tensor
    outputs: int | Tensor
    count, outputs = targets.shape
    if known is not None:
        count = known.double().sum()
    if present is not None:
        white, outputs = torch.where(present, white, 0), present.double().sum()
    logarithm = 2 * outputs * factor.diagonal().log().sum()
    terms = white.square().sum() + logarithm + count * outputs * math.log(2 * math.pi)
    found: Tensor = -0.5 * terms / (count * outputs)
    return found.to(kernel.dtype)


def predicted(
    kernel: Tensor,
    targets: Tensor,
    across: Tensor,
    own: Tensor,
    mean: Tensor,
    noise: Tensor,
    support_known: Tensor | None = None,
) -> Prediction:
    """The prediction for queries from a support set.

    Args:
        kernel: of the support set with itself, (examples, examples).
        targets: (examples, outputs).
        across: of the support set with the queries, (examples, queries).
        own: of each query with itself, (queries,).
        mean, noise: as in `marginal_likelihood`.
        support_known: bool (examples,), which of the support set count; None: all.
    """
    factor = _factor(kernel, noise, support_known)
    if support_known is not None:
        across = torch.where(support_known[:, None], across, 0)
    known = torch.linalg.solve_triangular(factor, across.double(), upper=False)
    centred = _centred(targets, mean, support_known)
    white = torch.linalg.solve_triangular(factor, centred, upper=False)
    variance = own.double() - known.square().sum(0) + noise.double()
    values = mean.double() + known.T @ white
    return Prediction(values.to(kernel.dtype), variance.to(kernel.dtype))


def _centred(targets: Tensor, mean: Tensor, known: Tensor | None) -> Tensor:
    centred = targets.double() - mean.double()
    return centred if known is None else torch.where(known[:, None], centred, 0)


def _factor(kernel: Tensor, noise: Tensor, known: Tensor | None) -> Tensor:
    """Of the covariance; an example that does not count has a variance of 1, and no other."""
    covariance, own = kernel.double(), noise.double()
    if known is not None:
        covariance = torch.where(known[:, None] & known, covariance, 0)
        own = torch.where(known, own, 1)
    eye = torch.eye(kernel.shape[0], dtype=torch.float64, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + own * eye)
    return torch.where(failed == 0, factor, torch.nan)
