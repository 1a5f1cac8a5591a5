"""Where a published data set lies below a folder, and in which layout: found out, never guessed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from metarun.components.data._layouts import Layout
from metarun.components.data._unpacking import archive_name
from metarun.errors import ConfigError, DataError


@dataclass(frozen=True)
class Benchmark:
    """A published data set.

    Attributes:
        name: of the component.
        title: as people call it.
        folders: how folders and archives with it are called; case and signs do not matter.
        inner: where it may be within such a folder.
        splits: the names of the classes of "train", "val" and "test".
        layouts: how it lies on disks, by the name of `data.layout`.
        per_class: pictures of each class, where all have as many.
        total: pictures of all classes.
        source: where a user gets it, in a sentence.
        side: pixels of height and width that pictures in files of their own must have, if any.
        aliases: further names of classes, with the published name of each.
    """

    name: str
    title: str
    folders: Sequence[str]
    splits: Mapping[str, Sequence[str]]
    layouts: Mapping[str, Layout]
    source: str
    inner: Sequence[str] = ()
    per_class: int | None = None
    total: int | None = None
    side: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """The name of a class, by what files may call it: without its superclass, say."""
        every = [name for own in self.splits.values() for name in own]
        return {n.split("/")[-1]: n for n in every} | {n: n for n in every} | {**self.aliases}


class Source(NamedTuple):
    """Where a data set was found: a folder, or an archive, and its layout."""

    place: Path
    layout: str  # "archive" until it is unpacked


def find(benchmark: Benchmark, root: Path, layout: str = "auto") -> Source:
    """Where the data set is below a folder.

    Folders that are called like it come first, then the folder itself, then archives.

    Raises:
        DataError: it is nowhere.
        ConfigError: it is there in several layouts or folders.
    """
    wanted = {n: one for n, one in benchmark.layouts.items() if layout in ("auto", n)}
    named = [root / name for name in _entries(root) if _is_called(benchmark, name)]
    for homes in ([place for place in named if place.is_dir()], [root]):
        places = [base / inner for base in homes for inner in ("", *benchmark.inner)]
        found = [Source(p, n) for p in places for n, one in wanted.items() if one.files(p)]
        if len(found) > 1:
            raise ConfigError(_several(benchmark, found))
        if found:
            return found[0]
        archives = [
            place / name
            for place in ([root, *homes] if homes != [root] else [root])
            for name in _entries(place)
            if (stem := archive_name(Path(name))) and _is_called(benchmark, stem)
        ]
        if len(archives) > 1:
            raise ConfigError(_several(benchmark, [Source(p, "archive") for p in archives]))
        if archives:
            return Source(archives[0], "archive")
    raise DataError(missing(benchmark, root))


def missing(benchmark: Benchmark, root: Path) -> str:
    """The message that a data set is not there: what was looked for, and what there is."""
    there = sorted(_entries(root))
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    layouts = "".join(f"\n  {one.what}" for one in benchmark.layouts.values())
    state = f"It has: {shown or 'nothing'}" if root.is_dir() else "There is no such folder"
    return (
        f"{benchmark.title} is not in {root}. {state}.\nAny of these is read, there or in a "
        f"folder called {benchmark.folders[0]}:{layouts}\n  an archive called so, of any of "
        f"these\n{benchmark.source} Set data.root=<folder> or METARUN_DATA=<folder> to where it is."
    )


def _several(benchmark: Benchmark, found: Sequence[Source]) -> str:
    layouts = {n: f"{one.what} (data.layout={n})" for n, one in benchmark.layouts.items()}
    choices = "".join(f"\n  {p}: {layouts.get(n, 'an archive')}" for p, n in found)
    if len({n for _, n in found}) == len(found):
        say = "say which with data.layout=…"
    else:
        say = "keep one" if found[0].layout == "archive" else "say which with data.root=…"
    return f"{benchmark.title} is there more than once; {say}:{choices}"


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _is_called(benchmark: Benchmark, name: str) -> bool:
    return _letters(name) in map(_letters, benchmark.folders)


def _letters(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
