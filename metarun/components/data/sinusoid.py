"""Sinusoid regression (Finn et al. 2017, section 5.1): the classic few-shot toy problem."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.components.data._curves import Curves, Numbers
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X_RANGE = (-5.0, 5.0)


@settings
class SinusoidConfig:
    """Regression on random sine curves (Finn et al. 2017)."""

    # The protocol of Finn et al. 2017, with fewer meta-steps than their 70,000.
    usual: ClassVar[dict[str, dict[str, Any]]] = {
        "task": {"way": 1, "shot": 10, "query": 10},
        "trainer": {
            "steps": 20000,
            "meta_batch": 25,
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "log_every": 200,
        },
    }


@builds(SinusoidConfig)
def sinusoid(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: SinusoidConfig
) -> "Sinusoids":
    """Episodes of curves."""
    return Sinusoids(shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)


class Sinusoids(Curves):
    """Tasks y = a·sin(x − b) with a in [0.1, 5], b in [0, π], x in [−5, 5], all uniform."""

    def __init__(
        self,
        *,
        shot: int,
        query: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = {"shot": shot, "query": query, "seed": seed}
        super().__init__("sinusoid", draw, "sinusoid-v1", **shape, device=device, dtype=dtype)


def draw(keys: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Points of sine curves: x and y, float64 (tasks, points), of keys (tasks, 1)."""
    numbers = Numbers(keys)
    amplitude, phase = numbers.uniform(1, *AMPLITUDE), numbers.uniform(1, *PHASE)
    x = numbers.uniform(points, *X_RANGE)
    return x, amplitude * torch.sin(x - phase)
