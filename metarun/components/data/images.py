"""From the images of a data set's splits to its episodes."""

from collections.abc import Callable
from typing import Any

import torch

from metarun.components.data.split_by_class import SplitConfig
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes, TooFewClasses
from metarun.episodes.store import ClassStore
from metarun.episodes.uneven import uneven_of


def image_episodes(load: Callable[..., dict[str, ClassStore]]) -> Callable[..., ImageEpisodes]:
    """What builds the episodes of a data set of images, from what loads it.

    Args:
        load: `load(**settings)` gives the images of "train", "val" and "test".

    Returns:
        `build(task, seed, device, dtype, **settings)`, as a component's.
    """

    def build(
        task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, /, **where: Any
    ) -> ImageEpisodes:
        stores = load(**where)
        try:
            return ImageEpisodes(
                stores,
                way=task.way,
                shot=task.shot,
                query=task.query,
                seed=seed,
                device=device,
                dtype=dtype,
                within=task.within,
                uneven=uneven_of(task),
            )
        except TooFewClasses as error:
            if not isinstance(where.get("own"), SplitConfig):
                raise
            raise TooFewClasses(
                f"{error}, or give that split more classes (by data.fractions, unless the data say "
                "themselves which are in it)"
            ) from error

    return build
