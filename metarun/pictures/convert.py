"""From pictures in files to a class-indexed store, by all cores, once."""

import functools
import hashlib
import logging
import os
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing import current_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from metarun.episodes.cache import kept
from metarun.episodes.store import ClassStore
from metarun.episodes.store_file import open_store, skipped_names
from metarun.errors import DataError, first_line, printable_name
from metarun.pictures.decode import MOST_BYTES, Pixels, Preprocessing, UnreadableError, decode
from metarun.pictures.listing import Listing, Picture, fingerprint, names_below
from metarun.pictures.partial import Done, Partial
from metarun.system.files import cache_dir
from metarun.system.untrusted import IrregularError, read_regular

log = logging.getLogger(__name__)

VERSION = 2  # raise when the same picture gives other pixels
SHOWN = 5  # pictures that are named each time they are left out
_REMEDY = "Mend or delete it, or leave out what cannot be read with data.skip_unreadable=true"
FEW = 256  # pictures that one process converts before another would have started

Reader = Callable[[Picture, Preprocessing], Pixels]


def read_pixels(picture: Picture, how: Preprocessing) -> Pixels:
    """The pixels of a picture in a file or a zip.

    Raises:
        UnreadableError: it is not there, or no picture.
    """
    try:
        if picture.member:
            return decode(_member(*picture), how)
        return decode(read_regular(picture.file, MOST_BYTES), how)
    except IrregularError as error:
        raise UnreadableError(str(error.strerror)) from error
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error


def converted(
    name: str,
    listing: Listing,
    how: Preprocessing,
    *,
    skip_unreadable: bool = False,
    read: Reader = read_pixels,
) -> ClassStore:
    """The pictures of a listing as one store, converted at the first call and cached.

    Where a picture has changed since, all are converted again.

    Args:
        name: of the data set, and the version of its reader; the cache file is called so.
        listing: the pictures. Stores of their splits are views: see `split_stores`.
        how: what is done to each.
        skip_unreadable: leave pictures out that cannot be read, and name them.
        read: gives the pixels of a picture, uint8 of `how.shape`. Called in other processes.

    Raises:
        DataError: a picture cannot be read, or the cache cannot be written.
    """
    # Wherever it is called from, and by whatever link, a folder is converted once.
    place = repr((os.path.realpath(listing.root), listing.layout, how))
    digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()
    path = cache_dir() / f"{name}-{digest[:16]}.safetensors"
    try:
        key = f"{VERSION} {fingerprint(listing)} {tuple(how)}"
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return opened(
        path,
        key,
        listing.root,
        skip_unreadable,
        lambda: convert(path, listing, how, key, skip_unreadable, read),
    )


def opened(
    path: Path, key: str, root: Path, skip_unreadable: bool, write: Callable[[], None]
) -> ClassStore:
    """The store in a file, which `write` writes where it is not there or stale.

    Args:
        key: what it has to be made of.
        root: where the pictures lie, for messages.
        skip_unreadable: whether pictures may have been left out; they are named each time.
        write: calls `convert`.

    Raises:
        DataError: pictures have been left out, and may not be.
    """
    store = kept(path, lambda: open_store(path, key), write)
    if left_out := skipped_names(store):
        if not skip_unreadable:
            raise DataError(f"cannot read the picture {left_out[0]} of {root}. {_REMEDY}")
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        shown = ", ".join(map(printable_name, left_out[:SHOWN]))
        log.warning("left out, unreadable: %s%s", shown, more)
    return store


def convert(
    path: Path,
    listing: Listing,
    how: Preprocessing,
    key: str,
    skip_unreadable: bool = False,
    read: Reader = read_pixels,
) -> None:
    """Convert pictures into the file of a store, or go on with a conversion that was killed.

    Memory: that of a picture, and of a batch of its images, for each core.

    Raises:
        DataError: as `converted`.
    """
    names = names_below(listing)
    log.info("converting %s pictures to %s", f"{len(names):,}", path)
    partial = Partial(path, how.shape, listing.class_names, listing.sizes, names, key)
    try:
        partial.begin()
        if partial.done:
            before = sum(len(partial.batch(number)) for number in partial.done)
            log.info("going on with a conversion: %d of %d pictures are done", before, len(names))
        _tell_unreadable(listing, partial.done, skip_unreadable)
        for number, done in _written(_Batches(partial, listing, how, read)):
            partial.note(number, done)
            _tell_unreadable(listing, {number: done}, skip_unreadable)
        partial.finish()
    except OSError as error:
        partial.discard()
        raise DataError(_no_room(path, error, len(names) * partial.pixels)) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that converts pictures has died ({first_line(error)}): the same command "
            "goes on where it was; if it dies again, there may be too little memory"
        ) from error
    except KeyboardInterrupt:
        log.info("what is converted is kept: the same command goes on with it")
        raise
    finally:
        _opened.cache_clear()


class _Written(NamedTuple):
    number: int
    done: Done | None
    error: OSError | None = None


class _Batches(Dataset[_Written]):
    """The batches of a conversion: to get one is to write it."""

    def __init__(
        self, partial: Partial, listing: Listing, how: Preprocessing, read: Reader
    ) -> None:
        self.partial, self._listing, self._how, self._read = partial, listing, how, read

    def __getitem__(self, number: int) -> _Written:
        rows, unreadable = self.partial.batch(number), []
        images = np.zeros((len(rows), *self._how.shape), np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, which nothing here needs
            for place, row in enumerate(rows):
                try:
                    images[place] = self._read(self._listing.pictures[row], self._how)
                except UnreadableError as error:
                    unreadable.append((row, str(error)))
        try:
            return _Written(number, Done(self.partial.write(number, images), unreadable))
        except OSError as error:  # told by the process that was asked for the conversion
            return _Written(number, None, error)


def _written(batches: _Batches) -> Iterator[tuple[int, Done]]:
    """Have the batches that are not done written, by as many processes as there are cores."""
    partial = batches.partial
    left = [number for number in range(partial.batches) if number not in partial.done]
    count = sum(len(partial.batch(number)) for number in left)
    workers = min(len(os.sched_getaffinity(0)), count // FEW)
    if current_process().daemon:  # which may have no children
        workers = 0
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=left,
        num_workers=workers if workers > 1 else 0,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_interrupts,
        multiprocessing_context="fork" if workers > 1 else None,
        generator=torch.Generator(),  # not the run's random numbers
    )
    what = f"converting to {'×'.join(map(str, partial.shape[1:]))}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
        written: Iterator[_Written] = iter(loader)
    with tqdm(total=count, desc=what, unit="picture", disable=None) as bar:
        for number, done, error in written:
            if done is None:
                assert error is not None
                raise error
            yield number, done
            bar.update(len(partial.batch(number)))


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the process that was asked for the conversion, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tell_unreadable(listing: Listing, done: dict[int, Done], skips: bool) -> None:
    """Refuse what cannot be read, or name it."""
    for number in sorted(done):
        for row, why in done[number].unreadable:
            if not skips:
                picture = listing.pictures[row]
                raise DataError(f"cannot read the picture {picture}: {why}. {_REMEDY}")
            log.warning("left out %s: %s", printable_name(listing.pictures[row]), why)


def _no_room(path: Path, error: OSError, needed: int) -> str:
    free = ""
    if path.parent.exists():
        free = f" of {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB that are free"
    return (
        f"cannot write the converted pictures to {path.parent}: {error.strerror}. They take "
        f"{needed / 2**20:.0f} MiB{free}; METARUN_CACHE=<folder> puts them elsewhere"
    )


def _member(archive: str, name: str) -> bytes:
    """The content of a file in a zip."""
    try:
        opened = _opened(archive, os.getpid())
        if opened.getinfo(name).file_size > MOST_BYTES:
            raise UnreadableError(f"it is larger than {MOST_BYTES >> 20} MiB")
        return opened.read(name)
    except UnreadableError:
        raise
    except Exception as error:  # damage has many types in zipfile
        raise UnreadableError(f"the archive is damaged ({error})") from error


@functools.lru_cache(maxsize=4)
def _opened(archive: str, process: int) -> zipfile.ZipFile:
    """Of each process its own: they would share the place where they read."""
    return zipfile.ZipFile(archive)
