"""Checkpoints: written atomically, verified when read, safe to load, exact to resume from.

A checkpoint is a dictionary of plain values and tensors, so that `torch.load` reads it with
`weights_only=True` and nothing in it can run code. Its keys:

    format, version     what it is (`FORMAT`, `VERSION`)
    config              the resolved config, a plain dictionary
    step                meta-steps done
    meta                meta-parameters by name: weights and learned hyperparameters
    outer_optimizer     state_dict of the outer optimizer
    scheduler           state_dict of its schedule, or None
    best                {"step", "score", "ci95"} of the best validation, or None
    last_eval           step of the last validation
    recent              training metrics since the last log line, (meta-steps, metrics)
    rng                 torch's random states: {"cpu": tensor, "cuda": [tensors]}
"""

import io
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from metarun.errors import CheckpointError
from metarun.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = "metarun-checkpoint"
VERSION = 1
KEEP = 2  # step-*.pt files; the older ones go


def save(folder: Path, content: dict[str, Any]) -> Path:
    """Write `step-<step>.pt`, then `last.pt` with the same bytes, and drop old step files.

    The step files are there for the case that `last.pt` is damaged later on.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    data = _serialise(content)
    path = folder / f"step-{content['step']:08d}.pt"
    for target in (path, folder / "last.pt"):
        write_atomically(target, lambda file: file.write(data))
    for old in _step_files(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def save_best(folder: Path, content: dict[str, Any]) -> None:
    """Write `best.pt`."""
    data = _serialise(content)
    write_atomically(folder / "best.pt", lambda file: file.write(data))


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run, or None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but none of them is intact.
    """
    candidates = [p for p in [folder / "last.pt", *_step_files(folder)] if p.exists()]
    for path in candidates:
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    if candidates:
        raise CheckpointError(f"none of the checkpoints in {folder} can be read")
    return None


def load(path: Path) -> dict[str, Any]:
    """Read and verify one checkpoint; its tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint of metarun, or of a newer
            format.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        # torch does not check the checksums that it writes into the archive; zipfile does.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is damaged, truncated or not a checkpoint at all ({error})"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of metarun: it cannot be loaded safely"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of metarun")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {content['version']}, but this metarun reads up to "
            f"{VERSION}: use a newer metarun"
        )
    return content


def _serialise(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    return buffer.getvalue()


def _step_files(folder: Path) -> list[Path]:
    """step-*.pt, newest first: by number, so that step 1000 comes before step 900."""
    numbered = [(re.fullmatch(r"step-(\d+)\.pt", p.name), p) for p in folder.glob("step-*.pt")]
    found = [(int(match.group(1)), path) for match, path in numbered if match]
    return [path for _, path in sorted(found, reverse=True)]
