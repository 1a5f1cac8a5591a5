"""Episodes: the few-shot tasks drawn from a data set, each a pure function of its index."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metarun.episodes.choosing import (
    choose_classes,
    choose_images,
    episode_keys,
    sample_indices,
)
from metarun.episodes.fitting import fitted
from metarun.episodes.groups import Groups, groups_for
from metarun.episodes.rng import random_bits, stream_key, uniform
from metarun.episodes.store import ClassStore, moved, staged
from metarun.episodes.uneven import (
    Uneven,
    choose_queries,
    choose_support,
    draw_shots,
    most_shots,
)


class Episodes(NamedTuple):
    """A batch of episodes; every tensor has the tasks as its first dimension.

    Attributes:
        support_x: (tasks, way * shot, *features), class by class.
        support_y: labels int64 (tasks, way * shot), or targets (tasks, shot, outputs).
        query_x: (tasks, way * query, *features).
        query_y: like support_y.

    Uneven tasks are padded to one shape by examples whose label is `PADDING`. They have
    `max_support` support examples in place of way * shot.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


class Batch(NamedTuple):
    """Plain batches of labelled examples; both tensors have the batches as their first dimension.

    Attributes:
        x: (batches, examples, *features).
        y: int64 (batches, examples), the number of the class among all of the split.
    """

    x: Tensor
    y: Tensor


class TooFew(ValueError):
    """A split has too few classes, or a class too few images, for the tasks."""


class TooFewClasses(TooFew):
    """A split has too few classes."""


SPLITS = ("train", "val", "test")


class EpisodeSource(Protocol):
    """What a data set offers to the rest of the program.

    It may have `splits`, where it has not all of `SPLITS`, and `tasks`, the number of tasks of a
    split where that is fixed.

    It may have an `identity`, a text that another content would not have; see
    `metarun.episodes.identity`.
    """

    input_shape: tuple[int, ...]  # of one example, without the batch
    outputs: int  # size of the network's output: the way, or the number of targets
    kind: str  # "classification" or "regression"

    def sample(self, split: str, start: int, count: int) -> Any:
        """`Episodes` `start` … `start + count - 1` of a split; of `LabelledExamples` a `Batch`."""
        ...


class ImageEpisodes:
    """N-way K-shot episodes from class-indexed images.

    Episode `i` of a split depends on `(seed, split, i)` alone: not on the batch it is drawn
    in, nor on what was drawn before, nor on the device.
    """

    kind = "classification"

    def __init__(
        self,
        stores: dict[str, ClassStore],
        *,
        way: int,
        shot: int,
        query: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        within: str = "all",
        uneven: Uneven | None = None,
    ) -> None:
        """Check that every split can supply the episodes, and move the images to `device`.

        Args:
            within: "group" for episodes whose classes are all of one group.
            uneven: between what way and shots are drawn; None: all episodes have the same shape.

        Raises:
            ValueError: a split has fewer classes than `way`, or a class fewer images than
                `shot + query`, or no group has enough classes.
        """
        for split, store in stores.items():
            _check_feasible(split, store, way, shot, query, uneven)
        self.identity = self._identity_of(stores)
        self.stores, self.device = moved(stores, device), device
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        self.dtype, self.within, self.uneven = dtype, within, uneven
        self._groups = {split: self._groups_of(split) for split in stores}
        self.input_shape = tuple(next(iter(stores.values())).images.shape[1:])
        self.outputs = way

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it has."""
        return tuple(self.stores)

    def _groups_of(self, split: str) -> Groups | None:
        if self.within != "group":
            return None
        store = self.stores[split]
        return groups_for(split, store.class_names, self.way).to(store.sizes.device)

    def _identity_of(self, stores: dict[str, ClassStore]) -> str | None:
        if type(self).sample is not ImageEpisodes.sample:
            return None
        contents = repr(sorted((split, store.identity) for split, store in stores.items()))
        return f"sha256:{hashlib.sha256(contents.encode()).hexdigest()}"

    def fitted(self, shape: tuple[int, ...], invert: bool = False) -> "ImageEpisodes":
        """The same episodes, with images as `metarun.episodes.fitting.fitted` makes them.

        Raises:
            ValueError: as there.
        """
        other = copy.copy(self)
        other.stores = {split: fitted(own, shape, invert) for split, own in self.stores.items()}
        other.identity = self._identity_of(other.stores)
        other.input_shape = tuple(shape)
        return other

    def alone(self, split: str) -> "ImageEpisodes":
        """The episodes of one split."""
        other = copy.copy(self)
        other.stores = {split: self.stores[split]}
        return other

    def of_shape(
        self,
        way: int,
        shot: int,
        query: int,
        within: str,
        uneven: Uneven | None = None,
        split: str = "train",
    ) -> "ImageEpisodes":
        """Episodes of a split in another shape, from the same images.

        Raises:
            ValueError: the split cannot supply them.
        """
        _check_feasible(split, self.stores[split], way, shot, query, uneven)
        other = copy.copy(self)
        other.way, other.shot, other.query, other.outputs = way, shot, query, way
        other.within, other.uneven = within, uneven
        other._groups = {split: other._groups_of(split)}
        return other

    def with_more_classes(self, more: int) -> "ImageEpisodes":
        """The same episodes with further classes, which have the labels behind the others.

        The support and query images of the classes that were there are the same.
        """
        other = copy.copy(self)
        other.way = other.outputs = self.way + more
        return other

    def classes(self, split: str, start: int, count: int) -> Tensor:
        """Which classes of a split episodes have: int64 (count, way), in the order of labels."""
        store = self.stores[split]
        keys, _ = episode_keys(store, self._key(split), start, count)
        return choose_classes(store, keys, self.way, self._groups[split])

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Draw episodes; images become floats in [0, 1]."""
        store, key = self.stores[split], self._key(split)
        if self.uneven is not None:
            return self._sample_uneven(self.uneven, split, key, start, count)
        chosen = sample_indices(
            store,
            key=key,
            start=start,
            count=count,
            way=self.way,
            per_class=self.shot + self.query,
            groups=self._groups[split],
        )
        support_x = self.values(store.take(chosen[:, :, : self.shot].flatten(1, 2)))
        query_x = self.values(store.take(chosen[:, :, self.shot :].flatten(1, 2)))
        labels = torch.arange(self.way, device=self.device)
        support_y = labels.repeat_interleave(self.shot).expand(count, -1)
        query_y = labels.repeat_interleave(self.query).expand(count, -1)
        return Episodes(support_x, support_y, query_x, query_y)

    def _sample_uneven(
        self, uneven: Uneven, split: str, key: int, start: int, count: int
    ) -> Episodes:
        store = self.stores[split]
        keys, episodes = episode_keys(store, key, start, count)
        classes = choose_classes(store, keys, self.way, self._groups[split])
        shots = draw_shots(
            uneven,
            stream_key("shapes", self.seed, split),
            episodes,
            store.sizes[classes],
            self.shot,
            self.query,
        )
        most = most_shots(uneven, self.shot, self.query, store.largest)
        images = choose_images(store, keys, classes, most + self.query)
        support, support_y = choose_support(shots, images, uneven.max_support)
        queries, query_y = choose_queries(shots, images, self.query)
        support_x, query_x = (self.values(store.take(part)) for part in (support, queries))
        support_y, query_y = (staged(labels, self.device) for labels in (support_y, query_y))
        return Episodes(support_x, support_y, query_x, query_y)

    def _key(self, split: str) -> int:
        return stream_key("episodes", self.seed, split)

    def values(self, drawn: Tensor) -> Tensor:
        """What a network gets of examples: images in [0, 1], features as they are."""
        values = staged(drawn, self.device).to(self.dtype)
        return values if drawn.is_floating_point() else values.div_(255.0)


def splits_of(source: EpisodeSource) -> tuple[str, ...]:
    """The splits that a source has."""
    found: tuple[str, ...] = getattr(source, "splits", SPLITS)
    return found


def an_episode(source: EpisodeSource) -> Any:
    """One episode, of training if there are such: to see what form they have."""
    return source.sample(splits_of(source)[0], 0, 1)


def training_classes(source: EpisodeSource) -> int | None:
    """How many classes there are to train on; None without labelled examples of them."""
    if not isinstance(source, ImageEpisodes) or "train" not in source.stores:
        return None
    return len(source.stores["train"].class_names)


class Batches:
    """Plain batches of the training split, for methods that learn an ordinary classifier.

    Batch `i` depends on `(seed, i)` alone, as an episode does. Its examples are drawn with
    replacement, each image as often as any other.

    Args:
        source: whose images.
        size: examples in a batch.
        change: `change(x, start)` of the examples of batches `start`, `start + 1`, …; None: none.

    Attributes:
        classes: how many classes the labels tell apart.
    """

    def __init__(
        self,
        source: ImageEpisodes,
        size: int,
        change: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        self._source, self._size, self._change = source, size, change
        self.classes = len(source.stores["train"].class_names)
        self._key = stream_key("batches", source.seed, "train")

    def sample(self, start: int, count: int) -> Batch:
        """Batches `start` … `start + count - 1`."""
        store, device = self._source.stores["train"], self._source.stores["train"].sizes.device
        batches = torch.arange(start, start + count, device=device)
        keys = random_bits(self._key, batches)[:, None]
        places = torch.arange(self._size, device=device)
        drawn = (uniform(keys, places) * store.count).long()  # class by class
        ends = store.sizes.cumsum(0)
        labels = torch.searchsorted(ends, drawn, right=True)
        chosen = store.starts[labels] + drawn - (ends - store.sizes)[labels]
        x = self._source.values(store.take(chosen))
        labels = staged(labels, self._source.device)
        return Batch(x if self._change is None else self._change(x, start), labels)


def _check_feasible(
    split: str, store: ClassStore, way: int, shot: int, query: int, uneven: Uneven | None
) -> None:
    classes = len(store.class_names)
    if way < 2:
        raise ValueError(f"task.way={way}: a classification task needs 2 classes or more")
    if way > classes:
        raise TooFewClasses(
            f"task.way={way} is more than the {classes} classes of the {split} split: lower "
            "task.way"
        )
    fewest = int(store.sizes.min())
    needed = "task.shot + task.query"
    if uneven is not None and uneven.imbalanced:  # a small class has fewer support examples
        shot, needed = 1, "a support example + task.query"
    if shot + query > fewest:
        name = store.class_names[int(store.sizes.argmin())]
        what = "examples" if store.images.is_floating_point() else "images"
        lower = "task.query" if shot < fewest else "task.shot"
        raise TooFew(
            f"{needed} = {shot} + {query} = {shot + query} is more than the "
            f"{fewest} {what} of class {name!r} in the {split} split: lower {lower}, or leave the "
            "class out"
        )


def is_uneven(*sources: EpisodeSource) -> bool:
    """Whether one of the sources has uneven tasks."""
    return any(getattr(source, "uneven", None) is not None for source in sources)
