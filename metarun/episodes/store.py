"""Examples grouped by class: images or features, and views of some of their classes."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """The file that a store was opened from, and the number there of the first of its images."""

    file: Path
    first: int = 0


@dataclass(frozen=True)
class ClassStore:
    """Examples of many classes, those of one class next to each other.

    Stores of several splits may share one tensor, of which each names the classes that it has.

    Attributes:
        images: uint8, (images, channels, height, width); or features, floating-point numbers
            (examples, features).
        starts: int64, (classes,); class c owns `images[starts[c]:starts[c] + sizes[c]]`.
        sizes: int64, (classes,); number of images of each class.
        class_names: one name a class.
        known: the `identity`, where it need not be computed.
        origin: where the images are from; None: they were made in memory.
    """

    images: Tensor
    starts: Tensor
    sizes: Tensor
    class_names: tuple[str, ...]
    known: str | None = None
    origin: Origin | None = None

    @cached_property
    def largest(self) -> int:
        """Number of images of the largest class."""
        return int(self.sizes.max())

    @cached_property
    def count(self) -> int:
        """Number of images of all its classes."""
        return int(self.sizes.sum())

    @cached_property
    def identity(self) -> str:
        """A digest of the content, the same on every machine; 25 MB take 0.03 s."""
        if self.known is not None:
            return self.known
        own = packed(self)
        shape, content = tuple(own.images.shape), [own.images.cpu().numpy().data]
        return identity_of(shape, content, own.sizes, self.class_names)

    def take(self, chosen: Tensor) -> Tensor:
        """The images of these numbers, on their device.

        Args:
            chosen: int64, any shape, on that device.

        Returns:
            (*chosen.shape, *shape of an image), of the type of `images`.
        """
        # Whole rows, which is ten times as fast as an index of several dimensions.
        rows = self.images.flatten(1).index_select(0, chosen.flatten())
        return rows.view(*chosen.shape, *self.images.shape[1:])


def identity_of(
    shape: tuple[int, ...],
    content: Iterable[bytes | memoryview],
    sizes: Tensor,
    class_names: Sequence[str],
) -> str:
    """The digest of a store whose classes follow each other.

    Args:
        shape: of all images.
        content: their bytes, in pieces of any length.
        sizes: int64, (classes,); number of images of each class.
        class_names: one name a class.
    """
    digest = hashlib.sha256(repr(shape).encode())
    for piece in content:
        digest.update(piece)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cpu().cumsum(0)])
    digest.update(repr(tuple(offsets.shape)).encode())
    digest.update(offsets.numpy().data)
    digest.update(repr(tuple(class_names)).encode(errors="surrogateescape"))
    return f"sha256:{digest.hexdigest()}"


def from_sizes(
    images: Tensor, sizes: Tensor, class_names: Sequence[str], known: str | None = None
) -> ClassStore:
    """A store of images that lie class by class, from the number of images of each class."""
    return ClassStore(images, sizes.cumsum(0) - sizes, sizes, tuple(class_names), known)


def from_equal_classes(images: Tensor, class_names: Sequence[str]) -> ClassStore:
    """A store from (classes, images per class, channels, height, width) uint8 images."""
    classes, per_class = images.shape[:2]
    sizes = torch.full((classes,), per_class)
    return from_sizes(images.flatten(0, 1).contiguous(), sizes, class_names)


def select_classes(store: ClassStore, classes: Sequence[int]) -> ClassStore:
    """A view of some classes, in the order given: no image is copied.

    Its `images` are those from the first image of any of them to the last.
    """
    chosen = torch.tensor(list(classes), dtype=torch.int64)
    starts, sizes = store.starts[chosen], store.sizes[chosen]
    first, last = int(starts.min()), int((starts + sizes).max())
    names = tuple(store.class_names[c] for c in classes)
    known, origin = derived(store, "classes", list(classes)), store.origin
    if origin is not None:
        origin = origin._replace(first=origin.first + first)
    return ClassStore(store.images[first:last], starts - first, sizes, names, known, origin)


def split_stores(store: ClassStore, splits: dict[str, list[int]]) -> dict[str, ClassStore]:
    """A view of the classes of each split, by their numbers."""
    return {split: select_classes(store, classes) for split, classes in splits.items()}


def packed(store: ClassStore) -> ClassStore:
    """The same classes, with images that follow each other in one tensor and no others."""
    ends = store.sizes.cumsum(0)
    if store.count == len(store.images) and torch.equal(store.starts, ends - store.sizes):
        return replace(store, images=store.images.contiguous())
    bounds = zip(store.starts.tolist(), store.sizes.tolist(), strict=True)
    images = torch.cat([store.images[start : start + size] for start, size in bounds])
    return replace(store, images=images, starts=ends - store.sizes, origin=None)


def with_rotations(store: ClassStore) -> ClassStore:
    """Every class four times: turned by 0, 90, 180 and 270 degrees, each a class of its own.

    The augmentation of Santoro et al. 2016 and Vinyals et al. 2016 for Omniglot. A turned class is
    in a turned group: 'Greek/character01' becomes 'Greek/rot0/character01' to 'Greek/rot270/…'.
    """
    own = packed(store)
    turned = [torch.rot90(own.images, turn, dims=(-2, -1)) for turn in range(4)]
    split = [name.rpartition("/") for name in store.class_names]
    names = [
        f"{group}{slash}rot{90 * turn}/{own}" for turn in range(4) for group, slash, own in split
    ]
    known = derived(store, "rotations")
    return from_sizes(torch.cat(turned), store.sizes.repeat(4), names, known)


def derived(store: ClassStore, *how: object) -> str:
    """The identity of what is made of a store in a given way, without reading its images again."""
    return f"sha256:{hashlib.sha256(repr((store.identity, *how)).encode()).hexdigest()}"


def moved(stores: dict[str, ClassStore], device: torch.device) -> dict[str, ClassStore]:
    """The stores on a device; images that several share are moved once.

    Where they would take more than half of a GPU's free memory, all of the stores stays where it
    is: what is drawn is chosen there, without asking the device, and `staged` moves it.
    """
    storages = [store.images.untyped_storage() for store in stores.values()]
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    there, fits = {}, needed <= free_memory(device) / 2
    if not fits:
        gib = needed / 2**30
        log.info("%s has no room for %.1f GiB of images: they stay in memory", device, gib)
    for storage, store in zip(storages, stores.values(), strict=True):
        if storage.data_ptr() not in there:
            whole = store.images.new_empty(0).set_(storage)
            there[storage.data_ptr()] = whole.to(device) if fits else whole
    found = {
        split: replace(
            store,
            images=there[storage.data_ptr()].as_strided(
                store.images.size(), store.images.stride(), store.images.storage_offset()
            ),
            starts=store.starts.to(device) if fits else store.starts,
            sizes=store.sizes.to(device) if fits else store.sizes,
        )
        for (split, store), storage in zip(stores.items(), storages, strict=True)
    }
    for split, store in stores.items():  # the device would have to be waited for at the first draw
        vars(found[split]).update(largest=store.largest, count=store.count)
    return found


def staged(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn, on a device.

    A GPU is sent it from pinned memory: the host goes on meanwhile, and can choose what comes next
    while the device still computes.
    """
    if drawn.device.type == device.type:
        return drawn
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


def free_memory(device: torch.device) -> float:
    """Bytes that a device can still give; a CPU has the images already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else torch.inf
