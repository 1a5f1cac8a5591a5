"""The same tasks with other labels: the classes of each in another order."""

import torch
from torch import Tensor

from metarun.episodes.rng import random_bits, stream_key
from metarun.episodes.source import Episodes, EpisodeSource


class Reordered:
    """Tasks of a source whose classes are in another order, so that each has another label.

    A network with a head of its own treats its outputs differently, so that the score of a task
    depends on which class has which label. The order is a pure function of its number, of the
    split and of the task.

    Args:
        source: of classification tasks that all have the same shape.
        order: which order; each number has another one.

    Example:
        >>> import metarun
        >>> from metarun.episodes.reordered import Reordered
        >>> source = metarun.load("outputs/train/mine").setup.source
        >>> Reordered(source, 1).sample("test", 0, 16).support_x.shape
        torch.Size([16, 5, 1, 28, 28])
    """

    def __init__(self, source: EpisodeSource, order: int) -> None:
        self._source, self._order = source, order
        self.input_shape, self.outputs, self.kind = source.input_shape, source.outputs, source.kind

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Tasks `start` … `start + count - 1` of a split."""
        tasks: Episodes = self._source.sample(split, start, count)
        way, device = self.outputs, tasks.support_y.device
        keys = random_bits(
            stream_key("orders", self._order, split),
            torch.arange(start, start + count, device=device),
        )
        order = random_bits(keys[:, None], torch.arange(way, device=device)).argsort(1)

        def reordered(x: Tensor) -> Tensor:
            blocks = x.view(count, way, -1, *x.shape[2:])  # examples stand class by class
            index = order.view(count, way, *[1] * (blocks.dim() - 2)).expand_as(blocks)
            return blocks.gather(1, index).flatten(1, 2)

        return tasks._replace(
            support_x=reordered(tasks.support_x), query_x=reordered(tasks.query_x)
        )
