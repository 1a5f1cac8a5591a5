"""Harmonics (Lacoste et al. 2018): regression on sums of two sine waves, one twice as fast."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.components.data._curves import Curves, Numbers
from metarun.components.data.sinusoid import SinusoidConfig
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig

FREQUENCY = (5.0, 7.0)
PHASE = (0.0, 2 * math.pi)
CENTRE = (-4.0, 4.0)


@settings
class HarmonicConfig:
    """Regression on sums of two sine waves (Lacoste et al. 2018)."""

    usual: ClassVar[dict[str, dict[str, Any]]] = SinusoidConfig.usual

    noise: float = 0.0  # standard deviation of what is added to each target

    def __post_init__(self) -> None:
        at_least("data.noise", self.noise, 0)


@builds(HarmonicConfig)
def harmonic(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: HarmonicConfig
) -> Curves:
    """Episodes of y = a₁·sin(ωx + b₁) + a₂·sin(2ωx + b₂).

    The amplitudes a are standard normal, the phases b uniform in [0, 2π], ω is uniform in [5, 7].
    The inputs of a task are normal around its own centre, which is uniform in [−4, 4], with
    variance 1. So a task shows a few waves of an own part of the axis. Normal noise is added to y.
    """

    def draw(keys: Tensor, points: int) -> tuple[Tensor, Tensor]:
        numbers = Numbers(keys)
        frequency, centre = numbers.uniform(1, *FREQUENCY), numbers.uniform(1, *CENTRE)
        x = centre + numbers.normal(points)
        slow = numbers.normal(1) * torch.sin(frequency * x + numbers.uniform(1, *PHASE))
        fast = numbers.normal(1) * torch.sin(2 * frequency * x + numbers.uniform(1, *PHASE))
        return x, slow + fast + numbers.normal(points, own.noise)

    return Curves(
        "harmonic", draw, f"harmonic-v1, noise {own.noise!r}",
        shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
