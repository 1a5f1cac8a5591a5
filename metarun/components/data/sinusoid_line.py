"""Sinusoids and lines (Finn, Xu and Levine 2018): regression tasks of two kinds."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.components.data._curves import Curves, Numbers
from metarun.components.data.sinusoid import AMPLITUDE, PHASE, X_RANGE, SinusoidConfig
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig

LINE = (-3.0, 3.0)  # slope and intercept


@settings
class SinusoidLineConfig:
    """Regression on sine curves and straight lines, each half of the tasks (Finn et al. 2018)."""

    usual: ClassVar[dict[str, dict[str, Any]]] = SinusoidConfig.usual

    noise: float = 0.3  # standard deviation of what is added to each target

    def __post_init__(self) -> None:
        at_least("data.noise", self.noise, 0)


@builds(SinusoidLineConfig)
def sinusoid_line(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: SinusoidLineConfig
) -> Curves:
    """Episodes of both kinds.

    A task is, with equal chances, y = a·sin(x − b), as `data=sinusoid` has it, or y = c·x + d with
    c and d uniform in [−3, 3]; x is uniform in [−5, 5]. Normal noise is added to y.
    """

    def draw(keys: Tensor, points: int) -> tuple[Tensor, Tensor]:
        numbers = Numbers(keys)
        is_line = numbers.uniform(1, 0, 1) < 0.5
        slope, intercept = numbers.uniform(1, *LINE), numbers.uniform(1, *LINE)
        amplitude = numbers.uniform(1, *AMPLITUDE)
        phase = numbers.uniform(1, *PHASE)
        x = numbers.uniform(points, *X_RANGE)
        y = torch.where(is_line, slope * x + intercept, amplitude * torch.sin(x - phase))
        return x, y + numbers.normal(points, own.noise)

    return Curves(
        "sinusoid_line", draw, f"sinusoid_line-v1, noise {own.noise!r}",
        shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
