"""Regression tasks, each of which is a random curve: what their data sets share."""

from collections.abc import Callable

import torch
from torch import Tensor

from metarun.episodes.rng import normal, random_bits, stream_key, uniform
from metarun.episodes.source import Episodes

Draw = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""`draw(keys, points) -> (x, y)`: float64 (tasks, points) each, of keys (tasks, 1)."""


class Curves:
    """Tasks (x, y) of one input and one output.

    Episode `i` of a split depends on `(seed, split, i)` alone. There are infinitely many tasks, so
    the splits differ by their random stream only.

    Args:
        stream: the name of the random stream.
        draw: the curves. It draws support and query alike.
        identity: a text that another `draw` would not have. Change it when an episode of the same
            seed gives other numbers. A subclass with a `sample` of its own has none.
        shot: examples of the support.
        query: examples of the query.
    """

    kind = "regression"
    input_shape = (1,)
    outputs = 1

    def __init__(
        self,
        stream: str,
        draw: Draw,
        identity: str,
        *,
        shot: int,
        query: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._stream, self._draw = stream, draw
        self.shot, self.query, self.seed = shot, query, seed
        self.device, self.dtype = device, dtype
        self.identity = identity if type(self).sample is Curves.sample else None

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Draw episodes: x and y are (tasks, shot, 1) and (tasks, query, 1)."""
        episodes = torch.arange(start, start + count, device=self.device)
        keys = random_bits(stream_key(self._stream, self.seed, split), episodes)[:, None]
        drawn = self._draw(keys, self.shot + self.query)
        x, y = (part.to(self.dtype)[:, :, None] for part in drawn)
        return Episodes(x[:, : self.shot], y[:, : self.shot], x[:, self.shot :], y[:, self.shot :])


class Numbers:
    """Independent random numbers of each task, in the order in which they are asked for.

    Args:
        keys: int64 (tasks, 1).
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys, self._used = keys, 0

    def _next(self, count: int) -> Tensor:
        counters = torch.arange(self._used, self._used + count, device=self._keys.device)
        self._used += count
        return counters

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        """Uniform numbers, float64 (tasks, count)."""
        return low + (high - low) * uniform(self._keys, self._next(count))

    def normal(self, count: int, deviation: float = 1.0) -> Tensor:
        """Normal numbers around 0, float64 (tasks, count)."""
        return deviation * normal(self._keys, self._next(2 * count))
