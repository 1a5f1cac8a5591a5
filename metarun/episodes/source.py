"""Episodes: the few-shot tasks drawn from a data set, each a pure function of its index."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metarun.episodes.fitting import fitted
from metarun.episodes.groups import Groups, groups_for
from metarun.episodes.rng import random_bits, stream_key, uniform
from metarun.episodes.store import ClassStore, moved


class Episodes(NamedTuple):
    """A batch of episodes; every tensor has the tasks as its first dimension.

    Attributes:
        support_x: (tasks, way * shot, *features), class by class.
        support_y: labels int64 (tasks, way * shot), or targets (tasks, shot, outputs).
        query_x: (tasks, way * query, *features).
        query_y: like support_y.
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
    ) -> None:
        """Check that every split can supply the episodes, and move the images to `device`.

        Args:
            within: "group" for episodes whose classes are all of one group.

        Raises:
            ValueError: a split has fewer classes than `way`, or a class fewer images than
                `shot + query`, or no group has enough classes.
        """
        for split, store in stores.items():
            _check_feasible(split, store, way, shot, query)
        self.identity = self._identity_of(stores)
        self.stores = moved(stores, device)
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        self.dtype, self.within = dtype, within
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

    def of_shape(self, way: int, shot: int, query: int, within: str) -> "ImageEpisodes":
        """Training episodes of another shape, from the same images.

        Raises:
            ValueError: the training split cannot supply them.
        """
        _check_feasible("train", self.stores["train"], way, shot, query)
        other = copy.copy(self)
        other.way, other.shot, other.query, other.outputs = way, shot, query, way
        other.within = within
        other._groups = {"train": other._groups_of("train")}
        return other

    def with_more_classes(self, more: int) -> "ImageEpisodes":
        """The same episodes with further classes, which have the labels behind the others.

        The support and query images of the classes that were there are the same.
        """
        other = copy.copy(self)
        other.way = other.outputs = self.way + more
        return other

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Draw episodes; images become floats in [0, 1]."""
        store = self.stores[split]
        chosen = sample_indices(
            store,
            key=stream_key("episodes", self.seed, split),
            start=start,
            count=count,
            way=self.way,
            per_class=self.shot + self.query,
            groups=self._groups[split],
        )
        support_x = self.values(store.take(chosen[:, :, : self.shot].flatten(1, 2)))
        query_x = self.values(store.take(chosen[:, :, self.shot :].flatten(1, 2)))
        labels = torch.arange(self.way, device=chosen.device)
        support_y = labels.repeat_interleave(self.shot).expand(count, -1)
        query_y = labels.repeat_interleave(self.query).expand(count, -1)
        return Episodes(support_x, support_y, query_x, query_y)

    def values(self, drawn: Tensor) -> Tensor:
        """What a network gets of examples: images in [0, 1], features as they are."""
        values = drawn.to(self.dtype)
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
        return Batch(x if self._change is None else self._change(x, start), labels)


def sample_indices(
    store: ClassStore,
    *,
    key: int,
    start: int,
    count: int,
    way: int,
    per_class: int,
    groups: Groups | None = None,
) -> Tensor:
    """Choose images for episodes `start` … `start + count - 1`.

    Every class gets a random 64-bit rank in every episode and the `way` highest are taken, in
    that order; the images of a chosen class are ranked likewise. So classes are distinct,
    their labels are random, and support and query are disjoint.

    With groups, all classes of an episode are of one. Each group that has `way` classes or more is
    as likely as any other, however many it has.

    Returns:
        int64 (count, way, per_class): indices into `store.images`.
    """
    device = store.sizes.device
    episodes = torch.arange(start, start + count, device=device)
    episode_keys = random_bits(key, episodes)[:, None]
    number = len(store.class_names)
    class_ranks = random_bits(episode_keys, torch.arange(number, device=device))
    if groups is not None:
        counter = torch.tensor([-1 - number], device=device)  # unused by what is drawn below
        place = (uniform(episode_keys, counter) * len(groups.large)).long()
        elsewhere = groups.of_class != groups.large[place]
        class_ranks = class_ranks.masked_fill(elsewhere, torch.iinfo(torch.int64).min)
    classes = class_ranks.topk(way, dim=1).indices  # (count, way)

    class_keys = random_bits(episode_keys, -1 - classes)[:, :, None]  # negative: unused so far
    image = torch.arange(store.largest, device=device)
    image_ranks = random_bits(class_keys, image)
    beyond_class = image >= store.sizes[classes][:, :, None]
    image_ranks = image_ranks.masked_fill(beyond_class, torch.iinfo(torch.int64).min)
    images = image_ranks.topk(per_class, dim=2).indices
    return store.starts[classes][:, :, None] + images


def _check_feasible(split: str, store: ClassStore, way: int, shot: int, query: int) -> None:
    classes = len(store.class_names)
    if way < 2:
        raise ValueError(f"task.way={way}: a classification task needs 2 classes or more")
    if way > classes:
        raise ValueError(f"task.way={way} is more than the {classes} classes of the {split} split")
    fewest = int(store.sizes.min())
    if shot + query > fewest:
        name = store.class_names[int(store.sizes.argmin())]
        what = "examples" if store.images.is_floating_point() else "images"
        raise ValueError(
            f"task.shot + task.query = {shot} + {query} = {shot + query} is more than the "
            f"{fewest} {what} of class {name!r} in the {split} split"
        )
