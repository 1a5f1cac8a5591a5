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


def marginal_likelihood(kernel: Tensor, targets: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
    """log N(y; m, K + σ²I), the mean over examples and outputs, ().

    Args:
        kernel: K, (examples, examples).
        targets: y, (examples, outputs): independent processes with the same kernel.
        mean: m, ().
        noise: σ², ().
    """
    factor = _factor(kernel, noise)
    white = torch.linalg.solve_triangular(factor, targets.double() - mean.double(), upper=False)
    count, outputs = targets.shape
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
) -> Prediction:
    """The prediction for queries from a support set.

    Args:
        kernel: of the support set with itself, (examples, examples).
        targets: (examples, outputs).
        across: of the support set with the queries, (examples, queries).
        own: of each query with itself, (queries,).
        mean, noise: as in `marginal_likelihood`.
    """
    factor = _factor(kernel, noise)
    known = torch.linalg.solve_triangular(factor, across.double(), upper=False)
    white = torch.linalg.solve_triangular(factor, targets.double() - mean.double(), upper=False)
    variance = own.double() - known.square().sum(0) + noise.double()
    values = mean.double() + known.T @ white
    return Prediction(values.to(kernel.dtype), variance.to(kernel.dtype))


def _factor(kernel: Tensor, noise: Tensor) -> Tensor:
    eye = torch.eye(kernel.shape[0], dtype=torch.float64, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(kernel.double() + noise.double() * eye)
    return torch.where(failed == 0, factor, torch.nan)
