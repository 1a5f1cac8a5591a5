"""Runs in one file for those who read a paper: what a figure is made of, and a check that it is.

A bundle is a zip file with the config, versions, log and scores by task of each run, without its
weights, and with the tables of the report. `manifest.json` has the SHA-256 of each file.
"""

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from metarun import __version__
from metarun.errors import ConfigError, RunError
from metarun.reporting.gather import Run, gather
from metarun.reporting.groups import HIGHER_IS_BETTER
from metarun.rundir.interval import deviation_within, half_width95
from metarun.rundir.provenance import EARLIER
from metarun.system.files import write_atomically
from metarun.system.untrusted import MOST_BYTES, read_regular

RUN_FILES = ("config.yaml", "provenance.json", "status.json", "result.json", "metrics.jsonl")
TABLES = ("report.csv", "report_pairs.csv", "report.tex")
"""Those that do not depend on where the runs are."""
PRIVATE = ("host", "pid", "argv")  # of provenance.json: names of machines and folders
MOST_FILES = 10**5
TOLERANCE = 1e-9  # of a figure that is computed again, in relation to it


def write_bundle(path: Path, roots: Sequence[str | Path], contents: Mapping[str, str]) -> int:
    """Write the runs below some folders and the tables of their report.

    Args:
        path: of the bundle.
        contents: the report's files by name.

    Returns:
        How many runs it has.

    Raises:
        RunError: a run's files or the bundle cannot be read or written.
    """
    files: dict[str, bytes] = {name: text.encode() for name, text in contents.items()}
    runs = [run for run in gather(roots).runs if run.test is not None]
    try:
        for number, run in enumerate(runs):
            folder = f"runs/{number:04}-{_plain(run.directory.resolve().name)}"
            for name in RUN_FILES:
                if (own := run.directory / name).exists():
                    files[f"{folder}/{name}"] = _shown(name, read_regular(own))
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = {"metarun": __version__, "files": digests}
        files["manifest.json"] = json.dumps(manifest, indent=1).encode()
        write_atomically(path, lambda file: file.write(_zipped(files)))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return len(runs)


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """A folder with the content of a bundle whose digests are right.

    Raises:
        ConfigError: it is no bundle, is damaged, or was changed.
    """
    try:
        files = _read(path)
        listed = json.loads(files.pop("manifest.json"))["files"]
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, NotImplementedError) as e:
        raise ConfigError(f"{path} is no bundle of metarun report, or is damaged: {e}") from e
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if found != listed:
        names = sorted(
            n for n in found.keys() | dict(listed).keys() if found.get(n) != listed.get(n)
        )
        raise ConfigError(f"{path} was changed: {', '.join(names[:5])} is not as the manifest says")
    with TemporaryDirectory(prefix="metarun-bundle-") as folder:
        for name, content in files.items():
            own = Path(folder, name)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(content)
        yield Path(folder)


def check(folder: Path, tables: Mapping[str, str]) -> tuple[int, int]:
    """Compute the figures of an opened bundle again, from its scores by task.

    Args:
        folder: as `opened` gives it.
        tables: the tables of the report on it, by file name.

    Returns:
        How many runs there are, and how many scores by task.

    Raises:
        RunError: names the figures that are others.
    """
    runs, scores = gather([folder / "runs"]).runs, 0
    wrong: list[str] = []
    for run in runs:
        wrong += _wrong(run)
        scores += len(run.test.by_task) if run.test is not None else 0
    for name in TABLES:
        kept = folder / name
        if not kept.exists() or kept.read_text(encoding="utf-8") != tables[name]:
            wrong.append(f"{name} is not what the runs give")
    if wrong:
        raise RunError("the bundle's figures do not follow from it:\n  " + "\n  ".join(wrong[:20]))
    return len(runs), scores


def _wrong(run: Run) -> Iterator[str]:
    """What of a run's figures does not follow from its scores by task and its log."""
    test, name = run.test, run.directory.name
    if test is None:
        yield f"{name}: it has no result"
    elif len(test.by_task) != test.episodes:
        yield f"{name}: {len(test.by_task)} scores by task, {test.episodes} tasks"
    else:
        mean = fmean(test.by_task)
        if not math.isclose(mean, test.value, rel_tol=TOLERANCE, abs_tol=1e-12):
            yield f"{name}: {test.score} {test.value}, the mean of its tasks is {mean}"
        if len(test.by_task) > 1:
            deviation = deviation_within(test.by_task, test.sources)
            half = half_width95(deviation, len(test.by_task), test.sources)
            if test.ci95 is None or not math.isclose(half, test.ci95, rel_tol=1e-6, abs_tol=1e-12):
                yield f"{name}: interval ± {test.ci95}, of its tasks it is ± {half}"
        tag = f"val/{test.score}"
        logged = [record[tag] for record in run.log if math.isfinite(record.get(tag, math.nan))]
        best = (max if HIGHER_IS_BETTER[test.score] else min)(logged, default=math.nan)
        if not math.isclose(best, test.validation, rel_tol=TOLERANCE, abs_tol=1e-12):
            yield f"{name}: best validation {test.validation}, in its log it is {best}"


def _read(path: Path) -> dict[str, bytes]:
    """The files of a zip file, whose names and sizes are checked first."""
    found, total = {}, 0
    with zipfile.ZipFile(io.BytesIO(read_regular(path, 2**30))) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_FILES:
            raise ValueError(f"it has {len(entries)} files")
        for entry in entries:
            parts = PurePosixPath(entry.filename).parts
            inside = 1 <= len(parts) <= 3 and not {"..", "/", "."} & set(parts)
            if not inside or "\\" in entry.filename or entry.is_dir():
                raise ValueError(f"it has a file {entry.filename!r}")
            total += entry.file_size
            if entry.file_size > MOST_BYTES or total > 2**31:
                raise ValueError("its files are too large")
            found[entry.filename] = archive.read(entry)
    return found


def _zipped(files: Mapping[str, bytes]) -> bytes:
    """The bytes of a zip file: the same for the same files."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return written.getvalue()


def _shown(name: str, content: bytes) -> bytes:
    """A file without what nobody else needs to know."""
    if name == "config.yaml":
        config: dict[str, Any] = yaml.safe_load(content)
        if "root" in config["data"]:
            config["data"]["root"] = None  # it is no part of what a run is
        return str(yaml.safe_dump(config, sort_keys=False)).encode()
    if name == "provenance.json":
        values: dict[str, Any] = json.loads(content)
        earlier = values.get(EARLIER)
        if isinstance(earlier, list):
            values[EARLIER] = [_public(a) for a in earlier if isinstance(a, dict)]
        return json.dumps(_public(values), indent=1).encode()
    return content


def _public(attempt: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attempt.items() if key not in PRIVATE}


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-=") else "_" for c in name)[:80]
