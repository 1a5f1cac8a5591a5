"""Images grouped by class, in memory, and their cache on disk."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from metarun.system import archive
from metarun.system.files import write_atomically

log = logging.getLogger(__name__)

CACHE_FORMAT = 2  # raise when the content of a cache file changes meaning


@dataclass(frozen=True)
class ClassStore:
    """Images of many classes, those of one class next to each other.

    Attributes:
        images: uint8, (images, channels, height, width); 0 is background, 255 full ink.
        offsets: int64, (classes + 1,); class c owns `images[offsets[c]:offsets[c + 1]]`.
        class_names: one name a class.
        known: the `identity`, where it need not be computed.
    """

    images: Tensor
    offsets: Tensor
    class_names: tuple[str, ...]
    known: str | None = None

    @property
    def sizes(self) -> Tensor:
        """Number of images of each class, int64 (classes,)."""
        return self.offsets.diff()

    @cached_property
    def largest(self) -> int:
        """Number of images of the largest class; asked of a GPU once, not at every draw."""
        return int(self.sizes.max())

    @cached_property
    def identity(self) -> str:
        """A digest of the content, the same on every machine; 25 MB take 0.03 s."""
        if self.known is not None:
            return self.known
        digest = hashlib.sha256()
        for part in (self.images, self.offsets):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().data)
        digest.update(repr(self.class_names).encode())
        return f"sha256:{digest.hexdigest()}"

    def to(self, device: torch.device) -> "ClassStore":
        """The same store with its tensors on `device`."""
        images, offsets = self.images.to(device), self.offsets.to(device)
        return ClassStore(images, offsets, self.class_names, self.known)


def from_equal_classes(images: Tensor, class_names: Sequence[str]) -> ClassStore:
    """A store from (classes, images per class, channels, height, width) uint8 images."""
    classes, per_class = images.shape[:2]
    offsets = torch.arange(classes + 1) * per_class
    return ClassStore(images.flatten(0, 1).contiguous(), offsets, tuple(class_names))


def select_classes(store: ClassStore, classes: Sequence[int]) -> ClassStore:
    """A store of some classes, in the order given."""
    bounds = [(int(store.offsets[c]), int(store.offsets[c + 1])) for c in classes]
    images = torch.cat([store.images[start:stop] for start, stop in bounds])
    sizes = torch.tensor([stop - start for start, stop in bounds])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    names = tuple(store.class_names[c] for c in classes)
    return ClassStore(images, offsets, names, derived(store, "classes", list(classes)))


def with_rotations(store: ClassStore) -> ClassStore:
    """Every class four times: turned by 0, 90, 180 and 270 degrees, each a class of its own.

    The augmentation of Santoro et al. 2016 and Vinyals et al. 2016 for Omniglot.
    """
    turned = [torch.rot90(store.images, turn, dims=(-2, -1)) for turn in range(4)]
    count = store.images.shape[0]
    offsets = [store.offsets[:-1] + turn * count for turn in range(4)]
    end = torch.tensor([4 * count])
    names = [f"{name}/rot{90 * turn}" for turn in range(4) for name in store.class_names]
    known = derived(store, "rotations")
    return ClassStore(torch.cat(turned), torch.cat([*offsets, end]), tuple(names), known)


def derived(store: ClassStore, *how: object) -> str:
    """The identity of what is made of a store in a given way, without reading its images again."""
    return f"sha256:{hashlib.sha256(repr((store.identity, *how)).encode()).hexdigest()}"


def cached(path: Path, build: Callable[[], ClassStore]) -> ClassStore:
    """Load the store at `path`, or build it and keep it there for the next time.

    Of several processes that need it, one builds it and the others wait. A cache that is damaged
    or of another format is built again; one that cannot be written (a full disk, a read-only
    home) costs time only, so it is logged and not an error.
    """
    with contextlib.suppress(Exception):
        return _read(path)
    with _alone(path):
        if path.exists():  # damaged, or another process has written it meanwhile
            try:
                return _read(path)
            except Exception as error:  # any damage has the same remedy: build it again
                log.warning("rebuilding the damaged cache %s (%s)", path, error)
        store = build()
        try:
            write_atomically(path, lambda file: file.write(archive.to_bytes(_to_dict(store))))
        except OSError as error:
            log.warning("could not cache the data set in %s (%s)", path, error)
    return store


def _read(path: Path) -> ClassStore:
    return _from_dict(archive.read(path))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock beside a file, which ends with its process; go without where there is none."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                log.info("waiting for another process, which prepares %s", path)
                held.enter_context(lock.acquire())
        except (OSError, NotImplementedError) as error:  # a read-only home, no locks there
            log.debug("no lock for %s (%s)", path, error)
        yield


def _to_dict(store: ClassStore) -> dict[str, Any]:
    return {
        "format": CACHE_FORMAT,
        "images": store.images,
        "offsets": store.offsets,
        "class_names": list(store.class_names),
        "identity": store.identity,
    }


def _from_dict(value: dict[str, Any]) -> ClassStore:
    if value["format"] != CACHE_FORMAT:
        raise ValueError(f"cache format {value['format']}, expected {CACHE_FORMAT}")
    images, offsets, names = value["images"], value["offsets"], tuple(value["class_names"])
    known = value["identity"]
    if (
        images.dtype is not torch.uint8
        or images.dim() != 4
        or offsets.dtype is not torch.int64
        or offsets.shape != (len(names) + 1,)
        or offsets.diff().min() < 1
        or (int(offsets[0]), int(offsets[-1])) != (0, len(images))
        or not all(isinstance(name, str) for name in names)
        or not isinstance(known, str)
    ):
        raise ValueError("the parts do not fit together")
    return ClassStore(images, offsets, names, known)
