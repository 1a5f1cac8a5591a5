"""Where Lake's 20 runs are on disk, and which drawing belongs to which."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from metarun.components.data._omniglot_files import Drawing, damaged
from metarun.errors import DataError

RUNS, WAY = 20, 20
FOLDER = "omniglot-one-shot"
ARCHIVE = "all_runs.zip"
PAIRS = "class_labels.txt"
MOST_BYTES = 10**5  # of the pairs of a run; those of the originals have 980
LINE = re.compile(r"(run\d\d/test/item\d\d\.png)\s+(run\d\d/training/class\d\d\.png)")


def find(root: Path) -> Path | None:
    """The zip of the runs, or the folder that has run01 … run20; None if there is neither."""
    for home in (root / FOLDER, root):
        for folder in (home / "all_runs", home):
            if (folder / "run01" / PAIRS).is_file():
                return folder
        if (home / ARCHIVE).is_file():
            return home / ARCHIVE
    return None


def missing(root: Path) -> DataError:
    """The error for a data folder without the runs: where they may be, and where they come from."""
    return DataError(
        f"Lake's runs are not in {root}. Any of these is read:\n"
        f"  {root / FOLDER / ARCHIVE} or {root / ARCHIVE}\n"
        f"  {root / FOLDER}/run01 … run20, or run01 … run20 in {root} itself\n"
        f"The file {ARCHIVE} is in the folder python/one-shot-classification of "
        "https://github.com/brendenlake/omniglot. Set data.root=<folder> or METARUN_DATA=<folder> "
        "to where it is."
    )


def list_drawings(part: Path) -> list[Drawing]:
    """The drawings of all runs: of each class the training drawing, then the test drawing.

    Args:
        part: what `find` gives.

    Returns:
        800 drawings of the classes 'run01/class01' to 'run20/class20', sorted by class.

    Raises:
        DataError: a run is missing, incomplete or damaged.
    """
    try:
        return list(_paired(part))
    except DataError:
        raise
    except Exception as error:  # damage has many types in zipfile
        raise damaged(part, "", error) from error


def _paired(part: Path) -> Iterator[Drawing]:
    prefix, texts = _texts(part)
    for number in range(1, RUNS + 1):
        run = f"run{number:02}"
        if run not in texts:
            raise DataError(f"{part} has no {run}/{PAIRS}: it should have run01 to run{RUNS}")
        pairs = {training: item for item, training in LINE.findall(texts[run])}
        wanted = [f"{run}/training/class{own:02}.png" for own in range(1, WAY + 1)]
        items = {f"{run}/test/item{own:02}.png" for own in range(1, WAY + 1)}
        if sorted(pairs) != wanted or set(pairs.values()) != items:
            raise DataError(
                f"{part}: {run}/{PAIRS} does not pair {WAY} test drawings with as many training "
                "drawings; put a good copy in its place"
            )
        for training in wanted:
            name = f"{run}/{Path(training).stem}"
            for file in (training, pairs[training]):
                yield Drawing(name, Path(file).name, part, prefix + file)


def _texts(part: Path) -> tuple[str, dict[str, str]]:
    """What stands before the names of the runs in a zip, and the pairs of each run."""
    if part.is_dir():
        files = {f"run{number:02}": part / f"run{number:02}" / PAIRS for number in range(1, 21)}
        return "", {run: _short(file) for run, file in files.items() if file.is_file()}
    with zipfile.ZipFile(part) as archive:
        found = {}
        for info in archive.infolist():
            match = re.fullmatch(rf"((?:[^/]+/)?)(run\d\d)/{re.escape(PAIRS)}", info.filename)
            if match and not match[1].startswith("__MACOSX") and info.file_size <= MOST_BYTES:
                found[match[2]] = (match[1], archive.read(info).decode("ascii", "replace"))
    prefixes = {prefix for prefix, _ in found.values()}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return prefix, {run: text for run, (own, text) in found.items() if own == prefix}


def _short(file: Path) -> str:
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file} has {file.stat().st_size} bytes: it is no list of pairs")
    return file.read_text(encoding="ascii", errors="replace")
