"""Derivatives by antithetic evolution strategies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metarun.unroll._torch import temporarily_clear_interpreter_stack
from metarun.unroll.gradients.modes import Evolution
from metarun.unroll.gradients.recompute import Flat, Pullback, RandomState, restrict_to, unchecked


def draw_seed() -> int:
    """A seed from torch's random state, which advances: no two unrolls try the same points."""
    with temporarily_clear_interpreter_stack():  # vmap would draw one for each task
        return int(torch.randint(2**62, ()))


def by_evolution(mode: Evolution, seed: int) -> Pullback:
    """A pullback that evaluates the function at pairs of random points around its inputs.

    All evaluations see the random numbers that the function saw first (dropout masks, say), so
    that they differ by their inputs only. The points have a random stream of their own.

    With ε standard normal over all wanted inputs together, the mean of
    cotangent · (fn(x + σε) − fn(x − σε)) / 2σ · ε estimates the derivative of fn smoothed by a
    Gaussian of width σ (Salimans et al. 2017, with their mirrored sampling).
    """

    def pullback(
        fn: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[int]
    ) -> Sequence[Tensor]:
        values = [inputs[i] for i in wanted]
        moved = restrict_to(unchecked(fn), inputs, wanted)  # elsewhere it gives something else
        totals = [torch.zeros_like(x) for x in values]
        random_state = RandomState(inputs)
        for sample in range(mode.samples):
            with random_state.seeded(seed + sample):
                noise = [torch.randn_like(x) for x in values]
            with random_state.restored():
                ahead = moved(*(x + mode.sigma * e for x, e in zip(values, noise, strict=True)))
            with random_state.restored():
                behind = moved(*(x - mode.sigma * e for x, e in zip(values, noise, strict=True)))
            slope = sum(
                (c * (a - b)).sum() for c, a, b in zip(cotangents, ahead, behind, strict=True)
            ) / (2 * mode.sigma * mode.samples)
            totals = [total + slope * e for total, e in zip(totals, noise, strict=True)]
        return totals

    return pullback
