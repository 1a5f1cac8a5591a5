"""The best checkpoints of a run by validation, of which an ensemble is made."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metarun.errors import CheckpointError, ConfigError
from metarun.rundir import checkpoint


def best_validations(run: str | Path, count: int) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run's checkpoints, and its best validations, the best first.

    Args:
        run: the directory that `ckpt=` names.
        count: how many are wanted.

    Returns:
        The folder, and {"step", "score", "ci95"} of each.

    Raises:
        CheckpointError: none of the checkpoints can be read.
        ConfigError: it is no run directory, or has fewer.
    """
    run = Path(run)
    if run.is_file():
        raise ConfigError(
            f"ensemble={count}: its checkpoints are found in a run directory, and ckpt={run} is a "
            "file; name the directory"
        )
    folder = checkpoint.find(run).parent
    newest = checkpoint.load_newest(folder)
    top: list[dict[str, Any]] = [] if newest is None else newest["top"]
    if len(top) < count:
        raise ConfigError(
            f"ensemble={count}: {run} has kept {len(top)} of its best checkpoints; lower it, or "
            f"train with trainer.keep_best={count}"
        )
    return folder, top[:count]


def load_each(
    folder: Path,
    top: Sequence[dict[str, Any]],
    is_of_run: Callable[[dict[str, Any]], bool] = lambda content: True,
) -> list[dict[str, Any]]:
    """The checkpoints of some validations.

    Args:
        folder: where a run's checkpoints are.
        top: {"step", …} of each.
        is_of_run: see `checkpoint.load_best`.

    Raises:
        CheckpointError: one is lost.
    """
    contents = []
    for validation in top:
        found = checkpoint.of_step(folder, validation["step"], is_of_run)
        if found is None:
            raise CheckpointError(
                f"{folder} has no intact checkpoint of meta-step {validation['step']}, which is "
                "among the best: choose a smaller ensemble"
            )
        contents.append(found[1])
    return contents
