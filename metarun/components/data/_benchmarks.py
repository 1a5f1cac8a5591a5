"""What published data sets of pictures have in common: settings, checks, conversion.

The pictures of each layout are compared with what is published, and converted once into one store,
whose splits are views.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from metarun.components.data._data_root import home
from metarun.components.data._finding import Benchmark, Source, find
from metarun.components.data._parts import read_part
from metarun.components.data._unpacking import unpacked
from metarun.components.data.pictures import Filter, PicturesConfig, Resize, preprocessing
from metarun.config.checks import absolute
from metarun.config.component import settings
from metarun.episodes.store import ClassStore, split_stores
from metarun.errors import DataError
from metarun.pictures.convert import convert, opened
from metarun.pictures.listing import Listing, Picture, bounds, fingerprint, listed
from metarun.system.files import cache_dir
from metarun.system.untrusted import UntrustedError

VERSION = 1  # raise when the same files give other images, or another order


@settings
class BenchmarkConfig(PicturesConfig):
    """Where the files of a published data set are, and how its pictures are read."""

    root: str | None = None  # folder of data sets; null: a cache folder of the user
    resize: Resize = "stretch"  # of a picture: its middle square, all of it, or all of it on white
    filter: Filter = "lanczos"  # of Pillow, for the change of size

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = absolute(self.root)


def load_benchmark(benchmark: Benchmark, own: Any) -> dict[str, ClassStore]:
    """The pictures of each split of a data set with settings that have a `layout`.

    Raises:
        DataError: they are not there, or not as they were published.
        ConfigError: they are there more than once.
    """
    return read_source(benchmark, find(benchmark, home(own.root), own.layout), own)


def whereabouts(benchmark: Benchmark, own: Any) -> str:
    """Where the data set is, and in which layout.

    Raises:
        DataError: it is nowhere.
        ConfigError: it is there more than once.
    """
    place, layout = find(benchmark, home(own.root), own.layout)
    return f"{place} ({benchmark.layouts[layout].what if layout != 'archive' else 'an archive'})"


def read_source(
    benchmark: Benchmark, source: Source, own: BenchmarkConfig
) -> dict[str, ClassStore]:
    """The pictures of each split, converted at the first call and kept.

    Raises:
        DataError: classes or pictures are missing, too many, damaged, or of another size.
    """
    how, (place, name) = preprocessing(own), source
    ready = None
    try:
        files = [place] if name == "archive" else benchmark.layouts[name].files(place)
        if all(file.is_file() for file in files):
            state = _state(files)
        else:
            ready = checked(benchmark, source)
            state = fingerprint(ready)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    what = repr((str(place), name, how, sorted(benchmark.splits.items())))
    digest = hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()
    path = cache_dir() / f"{benchmark.name}-{digest[:16]}.safetensors"
    key = f"{VERSION} {state} {tuple(how)}"

    def write() -> None:
        folder = path.with_name(f".{path.name}.unpacked")
        with _opened(benchmark, source, folder) as found:
            listing = ready or checked(benchmark, found)
            reader = partial(read_part, side=benchmark.side)
            convert(path, listing, how, key, own.skip_unreadable, reader)

    store = opened(path, key, place, own.skip_unreadable, write)
    ends = [0, *accumulate(len(names) for names in benchmark.splits.values())]
    numbers = {s: [*range(*ends[i : i + 2])] for i, s in enumerate(benchmark.splits)}
    return split_stores(store, numbers)


def checked(benchmark: Benchmark, source: Source) -> Listing:
    """The pictures of the data set, class by class in the published order.

    Raises:
        DataError: classes or pictures are missing, or too many, or classes in another split.
    """
    layout = benchmark.layouts[source.layout]
    try:
        there = layout.read(source.place)
    except UntrustedError as error:
        raise DataError(f"{source.place}: {error}") from error
    names = benchmark.names
    split_of = {name: split for split, own in benchmark.splits.items() for name in own}
    found: dict[str, list[Picture]] = {}
    extra, faults = [], []
    own_splits = {n: s for s, numbers in (there.splits or {}).items() for n in numbers}
    for number, (given, (start, stop)) in enumerate(
        zip(there.class_names, bounds(there.sizes), strict=True)
    ):
        name = names.get(given)
        if name is None:
            extra.append(given)
            continue
        found[name] = list(there.pictures[start:stop])
        if own_splits.get(number, split_of[name]) != split_of[name]:
            faults.append(f"{given} is in {own_splits[number]}, not in {split_of[name]}")
        if benchmark.per_class not in (None, len(found[name])):
            faults.append(f"{given} has {len(found[name])} pictures, not {benchmark.per_class}")
    lost = [name for name in split_of if name not in found]
    total = sum(map(len, found.values()))
    if lost:
        faults.insert(0, f"{_some(lost)} missing")
    elif benchmark.total not in (None, total):
        faults.append(f"there are {total:,} pictures, not {benchmark.total:,}")
    if extra and not layout.extras:
        faults.append(f"{_some(extra)} no class of it")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise DataError(
            f"{source.place} ({layout.what}) is not {benchmark.title} as it was published: {shown}"
        )
    return listed(there.root, there.layout, {name: found[name] for name in split_of})


@contextlib.contextmanager
def _opened(benchmark: Benchmark, source: Source, folder: Path) -> Iterator[Source]:
    """The source, with its archive unpacked into a folder for the time being."""
    if source.layout != "archive":
        yield source
        return
    with unpacked(source.place, folder):
        inner = find(benchmark, folder)
        if inner.layout == "archive":
            raise DataError(f"{source.place} has another archive in it: unpack that")
        yield inner


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"class {names[0]} is"
    return f"{len(names)} classes ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) are"


def _state(files: Sequence[Path]) -> str:
    """A name for the state of files: other names, sizes or times give another."""
    state = hashlib.sha256()
    for file in files:
        status = file.stat()
        state.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return state.hexdigest()
