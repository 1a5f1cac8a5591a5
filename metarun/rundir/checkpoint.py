"""Checkpoints: written atomically, read back, safe to load, exact to resume from.

A checkpoint is a safetensors file: nothing in it can run code, and any tool can open it (see
`metarun.system.archive`). Weights, buffers and frozen parameters have the names that the backbone
gives them; every other tensor has the path of its field (`outer_optimizer/state/0/exp_avg`).

Of a backbone whose parameters the algorithm takes as they are:

    >>> import metarun
    >>> import safetensors.torch
    >>> weights = safetensors.torch.load_file("outputs/train/mine/checkpoints/best.safetensors")
    >>> backbone = metarun.load("outputs/train/mine").model
    >>> known = {name: weights[name] for name in backbone.state_dict() if name in weights}
    >>> backbone.load_state_dict(known, strict=False)  # prototypes need no head
    _IncompatibleKeys(missing_keys=['head.weight', 'head.bias'], unexpected_keys=[])

Its fields, which `metarun.rundir.checkpoint_fields` checks:

    format, version     what it is (`FORMAT`, `VERSION`)
    config              the resolved config, a plain dictionary
    step                meta-steps done
    planned_for         meta-steps that the run was to have when it began
    skipped             how many of them were skipped, because their gradient was not finite
    meta                meta-parameters by name: weights and learned hyperparameters
    buffers             the network's buffers by name
    frozen              its frozen parameters by name
    outer_optimizer     state_dict of the outer optimizer
    scheduler           state_dict of its schedule, or None
    best                {"step", "score", "ci95"} of the best validation, or None
    top                 the same of the `trainer.keep_best` best ones, the best first
    last_eval           step of the last validation
    recent              training metrics since the last log line, by name, (meta-steps, …)
    elapsed_s           seconds that the run has taken, in all attempts; the only field that no two
                        runs share. Older checkpoints have none
    data_identity       which data it has seen (see `metarun.episodes.identity`); text
    chunks              tasks at a time that fitted into memory (engine.chunk=auto), of each rank by
                        program; older checkpoints have none
    examples            what its examples are (see `metarun.training.domain`), or None
    rng                 torch's random states: {"cpu": tensor, "cuda": [tensors]}

The files of a run end in `.safetensors`: `last` and `best`, which are replaced; `step-<step>`,
the same as `last` was at that step; and `best-step-<step>` of the best validations, where more
than one is kept. A file takes its name only after it has been read back, so whatever is deleted or
replaced, a good one is there.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metarun.config.renamed import with_todays_options
from metarun.errors import CheckpointError, ConfigError
from metarun.rundir.checkpoint_fields import check_fields
from metarun.rundir.checkpoint_files import (
    SUFFIX,
    best_file,
    best_step_file,
    best_step_files,
    last_file,
    step_file,
    step_files,
)
from metarun.system import archive
from metarun.system.files import write_atomically
from metarun.system.untrusted import DamagedError, UntrustedError

log = logging.getLogger(__name__)

FORMAT = "metarun-checkpoint"
VERSION = 3  # 1 and 2 were pickles: see scripts/convert_checkpoint.py
BY_OWN_NAME = ("meta", "buffers", "frozen")
"""Fields whose tensors have the names of the backbone's modules."""
CONVERT = "convert them with scripts/convert_checkpoint.py, which reads their pickles"


def save(folder: Path, content: dict[str, Any], keep_last: int, keep_every: int | None) -> Path:
    """Write `step-<step>`, then `last` with the same bytes, and drop old step files.

    The step files are there for the case that `last` is damaged later on, and for those who
    want to see how a run developed.

    Args:
        keep_last: how many of the newest step files stay.
        keep_every: those of multiples of this many meta-steps stay as well.

    Raises:
        OSError: the disk is full, read-only or does not give back what was written; earlier
            checkpoints are untouched.
    """
    data = to_bytes(content)
    path = step_file(folder, content["step"])
    for target in (path, last_file(folder)):
        _write(target, data)
    # Files of later steps belong to an attempt whose last file was lost: they do not count.
    steps = [step for step in step_files(folder) if step <= content["step"]]
    for step in steps[keep_last:]:
        if keep_every is None or step % keep_every:
            step_files(folder)[step].unlink(missing_ok=True)
    return path


def save_best(folder: Path, content: dict[str, Any], top: list[int], keep: int) -> None:
    """Write what is among the best: `best` if it is the best, `best-step-<step>` if more than
    one is kept; drop those that no longer are.

    Args:
        top: steps of the best validations, the best first; that of the content among them.
        keep: how many there may be.

    Raises:
        OSError: as `save`.
    """
    data = to_bytes(content)
    step, kept = content["step"], top if keep > 1 else []
    if kept:
        _write(best_step_file(folder, step), data)
    if step == top[0]:
        _write(best_file(folder), data)
    for other, path in best_step_files(folder).items():
        if other not in kept:
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
    last, best = last_file(folder), best_file(folder)
    numbered = [*step_files(folder).items(), *best_step_files(folder).items()]
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
    elif none and any(folder.glob("*.pt")):
        raise CheckpointError(f"the checkpoints in {folder} are of an older metarun: {CONVERT}")


def _readable(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return load(path)
    except CheckpointError as error:
        log.warning("%s; trying the one before", error)
        return None


def load_best(
    folder: str | Path,
    step: int,
    is_of_run: Callable[[dict[str, Any]], bool] = lambda content: True,
) -> dict[str, Any]:
    """The best checkpoint of a run; a copy takes its place if it is damaged or gone.

    Args:
        step: the meta-step of the best validation.
        is_of_run: whether a checkpoint is of this run; one of another counts as lost.

    Raises:
        CheckpointError: `best` is lost, and no other checkpoint is of that meta-step.
    """
    best = best_file(Path(folder))
    if (found := of_step(Path(folder), step, is_of_run)) is not None:
        path, content = found
        if path != best:
            _write(best, path.read_bytes())
        return content
    raise CheckpointError(
        f"{best} is lost, and there is no other checkpoint of meta-step {step}, the best by "
        f"validation: train again in a new hydra.run.dir; last{SUFFIX} is still good for "
        "metarun eval"
    )


def of_step(
    folder: Path, step: int, is_of_run: Callable[[dict[str, Any]], bool] = lambda content: True
) -> tuple[Path, dict[str, Any]] | None:
    """An intact checkpoint of a meta-step, and its file; None: there is none.

    Args:
        is_of_run: as in `load_best`.
    """
    best = best_file(folder)
    for path in (best, best_step_file(folder, step), step_file(folder, step)):
        if path != best and not path.exists():
            continue
        try:
            content = load(path)
        except CheckpointError as error:
            log.warning("%s; looking for another checkpoint of meta-step %d", error, step)
            continue
        if not is_of_run(content):
            log.warning("%s is of another run; looking for one of this", path)
        elif content["step"] == step:
            return path, content
    return None


def find(path: str | Path) -> Path:
    """The checkpoint that `ckpt=` means: a file, or the best (else the last) one of a run.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise ConfigError(f"ckpt={path}: there is no such run directory or checkpoint file")
    for folder in (path / "checkpoints", path):
        for candidate in (best_file(folder), last_file(folder)):
            if candidate.is_file():
                return candidate
        if any(folder.glob("*.pt")):
            raise ConfigError(f"ckpt={path}: its checkpoints are of an older metarun: {CONVERT}")
    raise ConfigError(f"ckpt={path}: this folder is no run directory with a checkpoint in it")


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
        content = archive.read(path)
    except (DamagedError, OSError) as error:
        advice = f"; if it is of an older metarun, {CONVERT}" if path.suffix == ".pt" else ""
        raise CheckpointError(
            f"{path} is damaged, truncated or not a checkpoint at all ({error}){advice}"
        ) from error
    except UntrustedError as error:
        raise CheckpointError(f"{path} is not a checkpoint of metarun ({error})") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of metarun")
    version = content.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, but this metarun reads up to "
            f"{VERSION}: use a newer metarun"
        )
    try:
        check_fields(content)
        content["outer_optimizer"] = _with_numbers(content["outer_optimizer"])
        content["config"] = with_todays_options(content["config"])
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a sound checkpoint: {error}") from error
    return content


def _with_words(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of a torch optimizer with words as keys, as JSON needs them."""
    return optimizer | {"state": {str(key): value for key, value in optimizer["state"].items()}}


def _with_numbers(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of a torch optimizer as torch had it: numbers as keys, settings as tuples."""
    if not all(key.isdecimal() and len(key) < 10 for key in optimizer["state"]):
        raise CheckpointError("its field 'outer_optimizer' is missing or not what it should be")
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in optimizer["param_groups"]
    ]
    state = {int(key): value for key, value in optimizer["state"].items()}
    return {"state": state, "param_groups": groups}


def _write(path: Path, data: bytes) -> None:
    def read_back(written: Path) -> None:
        try:
            archive.verify(written)
        except UntrustedError as error:
            reason = f"the disk does not give back what was written ({error})"
            raise OSError(errno.EIO, reason, str(path)) from error

    write_atomically(path, lambda file: file.write(data), read_back)


def to_bytes(content: dict[str, Any]) -> bytes:
    """The content of a checkpoint as its file has it."""
    marked = {"format": FORMAT, "version": VERSION, **content}
    marked["outer_optimizer"] = _with_words(content["outer_optimizer"])
    return archive.to_bytes(marked, BY_OWN_NAME)
