"""Derivatives by antithetic evolution strategies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metarun.unroll.gradients import Evolution
from metarun.unroll.recompute import Flat, Pullback, of_wanted


def by_evolution(mode: Evolution) -> Pullback:
    """A pullback that evaluates the function at pairs of random points around its inputs.

    With ε standard normal over all wanted inputs together, the mean of
    cotangent · (fn(x + σε) − fn(x − σε)) / 2σ · ε estimates the derivative of fn smoothed by a
    Gaussian of width σ (Salimans et al. 2017, with their mirrored sampling).
    """

    def pullback(
        fn: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[int]
    ) -> Sequence[Tensor]:
        values = [inputs[i] for i in wanted]
        moved = of_wanted(fn, inputs, wanted)
        totals = [torch.zeros_like(x) for x in values]
        for _ in range(mode.samples):
            noise = [torch.randn_like(x) for x in values]
            ahead = moved(*(x + mode.sigma * e for x, e in zip(values, noise, strict=True)))
            behind = moved(*(x - mode.sigma * e for x, e in zip(values, noise, strict=True)))
            slope = sum(
                (c * (a - b)).sum() for c, a, b in zip(cotangents, ahead, behind, strict=True)
            ) / (2 * mode.sigma * mode.samples)
            totals = [total + slope * e for total, e in zip(totals, noise, strict=True)]
        return totals

    return pullback
