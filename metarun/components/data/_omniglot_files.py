"""Where the Omniglot images are on disk: finding, checking and downloading them."""

import glob
import hashlib
import http.client
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from metarun.components.data._data_root import move, timeout
from metarun.errors import DataError

DRAWINGS = 20  # of each character
FOLDER = "omniglot-py"  # torchvision's name, so that a folder serves both programs
PARTS = ("images_background", "images_evaluation")
PATTERN = "*/character*/*.png"
MEMBER = re.compile(r"(?:^|/)([^/]+/character\d+)/([^/.][^/]*\.png)$")  # no ._* files of macOS


class Drawing(NamedTuple):
    """Where one image is; drawings sort by character and then by who drew them."""

    character: str  # 'Alphabet/characterNN'
    file: str  # 'NNNN_DD.png', DD the person
    part: Path  # a folder of alphabets or a zip
    member: str  # path within the part


def find(root: Path) -> tuple[Path, ...]:
    """The parts of the data set under `root`: folders of alphabets, or zips of them.

    Where there is nothing, one folder deeper is looked at as well: zips are often unpacked into
    folders of their own names, once more within.

    Returns:
        Background and evaluation set, or one folder that holds both, or nothing.
    """
    for homes in ([root / FOLDER, root], places_below(root)):
        for folder in homes:
            parts = _parts(folder)
            if len(parts) == len(PARTS):
                return tuple(parts.values())
    for homes in (
        [root / "omniglot", root],
        [f for f in places_below(root) if f.name in (FOLDER, "omniglot")],
    ):
        for folder in homes:
            if next(glob.iglob(PATTERN, root_dir=folder), None):
                return (folder,)
    return ()


def places_below(root: Path) -> list[Path]:
    """The folders one deeper than `find` looks first, as in a copy of the authors' repository."""
    homes = [home for home in (root / FOLDER, root / "omniglot", root) if home.is_dir()]
    found = [Path(entry.path) for home in homes for entry in _scan(home) if entry.is_dir()]
    return [place for folder in sorted(found) for place in (folder, folder / "python")]


def _parts(folder: Path) -> dict[str, Path]:
    """Which of the two sets `folder` holds, and as what: the extracted folder goes first."""
    found = {name: part_in(folder, name) for name in PARTS}
    return {name: place for name, place in found.items() if place is not None}


def part_in(folder: Path, name: str) -> Path | None:
    """A set in a folder: a folder of alphabets, or a zip of one; None where it is not."""
    inner = folder / name / name  # unpacked, or put, into a folder of its own name
    for place in (inner, inner.with_suffix(".zip"), folder / name, folder / f"{name}.zip"):
        if place.is_file() if place.suffix else place.is_dir() and any(place.iterdir()):
            return place
    return None


def fingerprint(source: Sequence[Path]) -> str:
    """A name for the state of the source: other files, sizes or times give another name.

    Looking at the 32,460 files of the extracted layout takes about a tenth of a second.
    """
    state = hashlib.sha256()
    for part in source:
        state.update(f"{part.resolve()}\n".encode())
        if part.is_dir():
            entries = sorted((member, entry.stat()) for member, entry in _walk(part))
        else:
            entries = [("", part.stat())]
        for member, stat in entries:
            state.update(f"{member} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


def list_drawings(source: Sequence[Path]) -> list[Drawing]:
    """Every drawing of the source, sorted.

    Raises:
        DataError: a zip or a folder cannot be read.
    """
    drawings = []
    for part in source:
        try:
            members = _members(part)
        except Exception as error:  # damage has many types in zipfile
            raise damaged(part, "", error) from error
        for member in members:
            if match := MEMBER.search(member):
                drawings.append(Drawing(match[1], match[2], part, member))
    return sorted(drawings)


def _members(part: Path) -> list[str]:
    if part.is_dir():
        return [member for member, _ in _walk(part)]
    with zipfile.ZipFile(part) as archive:
        return [name for name in archive.namelist() if not name.startswith("__MACOSX/")]


def _walk(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """'Alphabet/characterNN/file' and the file's entry, in no order (glob takes thrice as long)."""
    for alphabet in _scan(folder):
        if not alphabet.is_dir():
            continue
        for character in _scan(alphabet.path):
            if not (character.name.startswith("character") and character.is_dir()):
                continue
            for file in _scan(character.path):
                yield f"{alphabet.name}/{character.name}/{file.name}", file


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def check_complete(
    drawings: Sequence[Drawing], source: Sequence[Path], expected: Sequence[str]
) -> None:
    """Every expected character is there with its 20 drawings, and nothing else is.

    Raises:
        DataError: names the first few that differ.
    """
    counts = Counter(drawing.character for drawing in drawings)
    faults = [
        f"{name} has {counts[name]} drawings instead of {DRAWINGS}"
        for name in expected
        if 0 < counts[name] != DRAWINGS
    ]
    faults += [f"{name} is no character of Omniglot" for name in sorted({*counts} - {*expected})]
    lost = Counter(name.split("/")[0] for name in expected if name not in counts)
    faults += [f"{alphabet} lacks {count} characters" for alphabet, count in lost.items()]
    if not faults:
        return
    shown = "; ".join(faults[:5]) + ("; …" if len(faults) > 5 else "")
    raise DataError(
        f"Omniglot is not complete in {' and '.join(map(str, source))}: {shown}. {_remedy(source)}"
    )


def download_missing(root: Path) -> None:
    """Fetch the parts that are missing, each put in its place whole or not at all.

    Raises:
        DataError: the network or the disk failed; it says what else can be done.
    """
    home = root if root.name == FOLDER or _parts(root) else root / FOLDER
    lacking = [name for name in PARTS if name not in _parts(home)]
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        from torchvision.datasets import Omniglot  # takes seconds to import

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as draft, timeout():
            for name in lacking:
                Omniglot(draft, background=name == PARTS[0], download=True)
                home.mkdir(exist_ok=True)
                for part in (name, f"{name}.zip"):  # torchvision itself wants to find both
                    move(Path(draft) / FOLDER / part, home / part)
    except (OSError, RuntimeError, ImportError, http.client.HTTPException) as error:
        for folder in made:  # innermost first
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise missing(root, f"The download failed: {error}.\n") from error


def missing(root: Path, reason: str = "") -> DataError:
    """The error for a data folder without the images: where they may be, and what to do."""
    found = [part for folder in (root / FOLDER, root) for part in _parts(folder).values()]
    half = f"Only one of the two parts is there: {found[0]}.\n" if found else ""
    return DataError(
        f"The Omniglot images are not in {root}.\n{half}{reason}"
        "Any of these layouts is read:\n"
        f"  {root / FOLDER}/images_{{background,evaluation}}/<Alphabet>/characterNN/*.png\n"
        f"  {root / FOLDER}/images_{{background,evaluation}}.zip\n"
        f"  {root / 'omniglot'}/<Alphabet>/characterNN/*.png\n"
        f"  and {root} itself may be the {FOLDER} or the omniglot folder.\n"
        "Set data.root=<folder> or METARUN_DATA=<folder> to where they are, or data.download=true "
        "to fetch them (14 MB), or take data=glyphs, which needs no files."
    )


def damaged(part: Path, member: str, error: Exception) -> DataError:
    """The error for a zip, or for a file in a folder, that cannot be read."""
    file = part if part.is_file() else part / member
    inside = f" ({member})" if member and part.is_file() else ""
    reason = str(error) or type(error).__name__
    return DataError(f"{file} is damaged{inside}: {reason}. {_remedy([part])}")


def _remedy(source: Sequence[Path]) -> str:
    remedy = "Put a good copy in its place"
    # The flat folder may hold other things of the user: no advice to delete that.
    if all(part.stem in PARTS for part in source):
        places = " or ".join(map(str, source))
        remedy += f", or delete {places} and download again with data.download=true"
    return remedy + "."
