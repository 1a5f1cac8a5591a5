"""Checkpoints: written atomically, read back, safe to load, exact to resume from.

A checkpoint is a dictionary of plain values and tensors, so that nothing in it can run code
(see `metarun.system.untrusted`). Its keys, which `metarun.rundir.checkpoint_fields` checks:

    format, version     what it is (`FORMAT`, `VERSION`)
    config              the resolved config, a plain dictionary
    step                meta-steps done
    skipped             how many of them were skipped, because their gradient was not finite
    meta                meta-parameters by name: weights and learned hyperparameters
    buffers             the network's buffers by name (version 2)
    frozen              its frozen parameters by name (version 2)
    outer_optimizer     state_dict of the outer optimizer
    scheduler           state_dict of its schedule, or None
    best                {"step", "score", "ci95"} of the best validation, or None
    top                 the same of the `trainer.keep_best` best ones, the best first
    last_eval           step of the last validation
    recent              training metrics since the last log line, (meta-steps, metrics)
    data_identity       which data it has seen (see `metarun.episodes.identity`); text
    rng                 torch's random states: {"cpu": tensor, "cuda": [tensors]}

The files of a run: `last.pt` and `best.pt`, which are replaced; `step-<step>.pt`, the same as
`last.pt` was at that step; and `best-step-<step>.pt` of the best validations, where more than
one is kept. A file takes its name only after it has been read back, so whatever is deleted or
replaced, a good one is there.
"""

import errno
import io
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from metarun.errors import CheckpointError
from metarun.rundir.checkpoint_fields import check_fields
from metarun.system import untrusted
from metarun.system.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = "metarun-checkpoint"
VERSION = 2  # 1 knew of no buffers and no frozen parameters; where there are none, it is written


def save(folder: Path, content: dict[str, Any], keep_last: int, keep_every: int | None) -> Path:
    """Write `step-<step>.pt`, then `last.pt` with the same bytes, and drop old step files.

    The step files are there for the case that `last.pt` is damaged later on, and for those who
    want to see how a run developed.

    Args:
        keep_last: how many of the newest step files stay.
        keep_every: those of multiples of this many meta-steps stay as well.

    Raises:
        OSError: the disk is full, read-only or does not give back what was written; earlier
            checkpoints are untouched.
    """
    data = _serialise(content)
    path = _step_file(folder, content["step"])
    for target in (path, folder / "last.pt"):
        _write(target, data)
    # Files of later steps belong to an attempt whose last.pt was lost: they do not count.
    steps = [step for step in _step_files(folder) if step <= content["step"]]
    for step in steps[keep_last:]:
        if keep_every is None or step % keep_every:
            _step_files(folder)[step].unlink(missing_ok=True)
    return path


def save_best(folder: Path, content: dict[str, Any], top: list[int], keep: int) -> None:
    """Write what is among the best: `best.pt` if it is the best, `best-step-<step>.pt` if more
    than one is kept; drop those that no longer are.

    Args:
        top: steps of the best validations, the best first; that of the content among them.
        keep: how many there may be.

    Raises:
        OSError: as `save`.
    """
    data = _serialise(content)
    names = [f"best-step-{step:08d}.pt" for step in top] if keep > 1 else []
    step = content["step"]
    if names:
        _write(folder / names[top.index(step)], data)
    if step == top[0]:
        _write(folder / "best.pt", data)
    for path in folder.glob("best-step-*.pt"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def load_newest(
    folder: str | Path, log_complete: Callable[[dict[str, Any]], bool] = lambda content: True
) -> dict[str, Any] | None:
    """The newest intact checkpoint of a run, or None if there is none at all.

    Args:
        log_complete: whether metrics.jsonl has all lines from before a checkpoint. If it lacks
            some, the run goes back one checkpoint more to log them again: a damaged tail then
            costs a few meta-steps and no figure. What is missing from further back stays missing.

    Raises:
        CheckpointError: there are checkpoints, but none of them is intact.
    """
    newest = None
    for content in _intact(Path(folder)):
        if log_complete(content):
            if newest is not None:
                log.warning(
                    "metrics.jsonl lacks lines from before meta-step %d: going back to meta-step "
                    "%d to log them again", newest["step"], content["step"],
                )  # fmt: skip
            return content
        newest = newest or content
        if content["step"] != newest["step"]:
            break
    if newest is not None:
        log.warning("metrics.jsonl lacks lines from before meta-step %d", newest["step"])
    return newest


def _intact(folder: Path) -> Iterator[dict[str, Any]]:
    """The checkpoints that can be read, the newest first; an error if there are others only."""
    last, best = folder / "last.pt", folder / "best.pt"
    numbered = [*_numbered(folder, "step"), *_numbered(folder, "best-step")]
    numbered.sort(key=lambda item: item[0], reverse=True)
    none = True
    if (content := _readable(last)) is not None:
        none = False
        yield content
    content = _readable(best)  # its name does not say of which meta-step it is
    for step, path in numbered:
        if content is not None and content["step"] > step:
            none = False
            yield content
            content = None
        if (other := _readable(path)) is not None:
            none = False
            yield other
    if content is not None:
        yield content
    elif none and (numbered or last.exists() or best.exists()):
        raise CheckpointError(f"none of the checkpoints in {folder} can be read")


def _readable(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return load(path)
    except CheckpointError as error:
        log.warning("%s; trying the one before", error)
        return None


def load_best(folder: str | Path, step: int) -> dict[str, Any]:
    """The best checkpoint of a run; a copy takes its place if it is damaged or gone.

    Args:
        step: the meta-step of the best validation.

    Raises:
        CheckpointError: `best.pt` is lost, and no other checkpoint is of that meta-step.
    """
    folder = Path(folder)
    best = folder / "best.pt"
    for path in (best, folder / f"best-step-{step:08d}.pt", _step_file(folder, step)):
        try:
            content = load(path)
        except CheckpointError as error:
            log.warning("%s; looking for another checkpoint of meta-step %d", error, step)
            continue
        if content["step"] == step:
            if path != best:
                _write(best, path.read_bytes())
            return content
    raise CheckpointError(
        f"{best} is lost, and there is no other checkpoint of meta-step {step}, the best by "
        "validation: train again in a new hydra.run.dir; last.pt is still good for metarun eval"
    )


def load(path: str | Path) -> dict[str, Any]:
    """Read and verify one checkpoint; its tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint of metarun, or of a newer
            format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = untrusted.load(path)
    except (untrusted.DamagedError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged, truncated or not a checkpoint at all ({error})"
        ) from error
    except untrusted.UntrustedError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of metarun: it cannot be loaded safely ({error})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of metarun")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, but this metarun reads up to "
            f"{VERSION}: use a newer metarun"
        )
    try:
        check_fields(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a sound checkpoint: {error}") from error
    return content


def _write(path: Path, data: bytes) -> None:
    def read_back(written: Path) -> None:
        try:
            untrusted.verify(written)
        except untrusted.UntrustedError as error:
            reason = f"the disk does not give back what was written ({error})"
            raise OSError(errno.EIO, reason, str(path)) from error

    write_atomically(path, lambda file: file.write(data), read_back)


def _serialise(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    version = VERSION if content.get("buffers") or content.get("frozen") else 1
    torch.save({"format": FORMAT, "version": version, **content}, buffer)
    return buffer.getvalue()


def _step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _step_files(folder: Path) -> dict[int, Path]:
    """step-*.pt, newest first: by number, so that step 1000 comes before step 900."""
    return dict(sorted(_numbered(folder, "step"), reverse=True))


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """The files <name>-<step>.pt with their steps."""
    paths = folder.glob(f"{name}-*.pt")
    found = [(re.fullmatch(rf"{name}-(\d+)\.pt", path.name), path) for path in paths]
    return [(int(match.group(1)), path) for match, path in found if match]
