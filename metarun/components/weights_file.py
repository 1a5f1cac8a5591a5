"""Reading weights from a file that nobody vouches for, as tensors by name."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from metarun.components.algo.base import HYPERPARAMETERS
from metarun.errors import CheckpointError, ConfigError, first_line
from metarun.rundir import checkpoint
from metarun.rundir.checkpoint_files import SUFFIX
from metarun.system import archive
from metarun.system.memory import machine_memory
from metarun.system.untrusted import read_regular

CONTAINERS = ("state_dict", "model_state_dict", "model", "params", "state", "net")
"""Under which of its entries a file of torch's may keep the weights."""


class Content(NamedTuple):
    """What is in a file.

    Attributes:
        tensors: by name.
        digest: of the file.
        ours: whether it is a checkpoint of metarun, which may hold parts of an algorithm's own.
    """

    tensors: dict[str, Tensor]
    digest: str
    ours: bool


def read_weights(path: str) -> Content:
    """The tensors of a file of safetensors, or of `torch.save`, without running code of it.

    Args:
        path: the file, or the directory of a run of metarun, whose best checkpoint is meant.

    Raises:
        ConfigError: says why there are none.
    """
    file = _file_of(path)
    try:
        data = read_regular(file, machine_memory())
    except FileNotFoundError as error:
        raise ConfigError(
            f"backbone.weights={path}: there is no such file. metarun downloads no weights: get "
            "them from where they are published, and name the file"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"backbone.weights={path} cannot be read: {reason}") from error
    try:
        ours = file.suffix == SUFFIX and _is_ours(data)
        if ours:
            content = checkpoint.load(file)
            fields = (content[name] for name in checkpoint.BY_OWN_NAME)
            tensors: Any = {
                name: value
                for field in fields
                for name, value in field.items()
                if not name.startswith(HYPERPARAMETERS)
            }
        elif file.suffix == SUFFIX:
            tensors = load_tensors(data)
        else:
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: the file decides what goes wrong
        raise ConfigError(
            f"backbone.weights={path}: it cannot be read as weights alone "
            f"({first_line(error).rstrip('.')[:160]}); save them by "
            "torch.save(model.state_dict(), …), or as safetensors"
        ) from error
    while isinstance(tensors, dict) and (
        inner := next((tensors[k] for k in CONTAINERS if isinstance(tensors.get(k), dict)), None)
    ):
        tensors = inner
    named = isinstance(tensors, dict) and len(tensors) > 0
    if not named or not all(type(k) is str and isinstance(v, Tensor) for k, v in tensors.items()):
        raise ConfigError(
            f"backbone.weights={path}: it holds no weights by name; save them by "
            "torch.save(model.state_dict(), …)"
        )
    return Content(tensors, hashlib.sha256(data).hexdigest(), ours)


def run_behind(path: str) -> dict[str, Any] | None:
    """The checkpoint of metarun that weights are read from; None where it is another file.

    Raises:
        ConfigError: there is no such file.
    """
    file = _file_of(path)
    try:
        return checkpoint.load(file) if file.suffix == SUFFIX else None
    except CheckpointError:
        return None


def _file_of(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_dir():
        return file
    try:
        return checkpoint.find(file)
    except ConfigError as error:
        reason = str(error).partition(": ")[2]
        raise ConfigError(f"backbone.weights={path}: {reason}") from error


def _is_ours(data: bytes) -> bool:
    """Whether the header of a file of safetensors is one of metarun's."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return archive.ENTRY in header.get("__metadata__", {})
