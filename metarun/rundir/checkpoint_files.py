"""How the checkpoint files of a run are called; see `metarun.rundir.checkpoint`."""

import re
from pathlib import Path

SUFFIX = ".safetensors"


def last_file(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    return folder / f"last{SUFFIX}"


def best_file(folder: Path) -> Path:
    """The best checkpoint of a run by validation."""
    return folder / f"best{SUFFIX}"


def step_file(folder: Path, step: int) -> Path:
    """What `last` was at a meta-step."""
    return folder / f"step-{step:08d}{SUFFIX}"


def best_step_file(folder: Path, step: int) -> Path:
    """One of the best by validation, where more than one is kept."""
    return folder / f"best-step-{step:08d}{SUFFIX}"


def step_files(folder: Path) -> dict[int, Path]:
    """The step files, newest first: by number, so that step 1000 comes before step 900."""
    return dict(sorted(_numbered(folder, "step").items(), reverse=True))


def best_step_files(folder: Path) -> dict[int, Path]:
    """The files of the best ones by their steps."""
    return _numbered(folder, "best-step")


def newest_step(folder: Path) -> int:
    """The meta-step of the newest step file, by its name; 0 if there is none."""
    return max(step_files(folder), default=0)


def _numbered(folder: Path, name: str) -> dict[int, Path]:
    """The files <name>-<step> by their steps."""
    paths = folder.glob(f"{name}-*{SUFFIX}")
    found = [(re.fullmatch(rf"{name}-(\d+){re.escape(SUFFIX)}", path.name), path) for path in paths]
    return {int(match.group(1)): path for match, path in found if match}
