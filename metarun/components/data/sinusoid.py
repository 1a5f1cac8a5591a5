"""Sinusoid regression (Finn et al. 2017, section 5.1): the classic few-shot toy problem."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.rng import random_bits, stream_key, uniform
from metarun.episodes.source import Episodes

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


class Sinusoids:
    """Tasks y = a·sin(x − b) with a in [0.1, 5], b in [0, π], x in [−5, 5], all uniform.

    Episode `i` of a split depends on `(seed, split, i)` alone. There are infinitely many
    tasks, so the splits differ by their random stream only.
    """

    kind = "regression"
    input_shape = (1,)
    outputs = 1

    def __init__(
        self,
        *,
        shot: int,
        query: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shot, self.query, self.seed = shot, query, seed
        self.device, self.dtype = device, dtype
        # Raised when an episode of the same seed gives other numbers. A subclass has its own.
        self.identity = "sinusoid-v1" if type(self).sample is Sinusoids.sample else None

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Draw episodes: x and y are (tasks, shot, 1) and (tasks, query, 1)."""
        episodes = torch.arange(start, start + count, device=self.device)
        keys = random_bits(stream_key("sinusoid", self.seed, split), episodes)[:, None]
        numbers = uniform(keys, torch.arange(2 + self.shot + self.query, device=self.device))
        amplitude = _scale(numbers[:, 0:1], AMPLITUDE)
        phase = _scale(numbers[:, 1:2], PHASE)
        x = _scale(numbers[:, 2:], X_RANGE)
        y = amplitude * torch.sin(x - phase)
        x, y = x.to(self.dtype)[:, :, None], y.to(self.dtype)[:, :, None]
        return Episodes(x[:, : self.shot], y[:, : self.shot], x[:, self.shot :], y[:, self.shot :])


def _scale(unit: Tensor, bounds: tuple[float, float]) -> Tensor:
    low, high = bounds
    return low + (high - low) * unit
