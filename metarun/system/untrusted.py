"""Reading files that nobody vouches for: regular, within bounds, and as plain values."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import yaml

_T = TypeVar("_T")

MOST_BYTES = 2**26  # of a file that is read whole
MOST_CONFIG = 2**17  # of a config.yaml; ours have three thousand, and the parser takes its time
DEEPEST_CONFIG = 20  # containers within each other


class UntrustedError(ValueError):
    """A file is damaged, or holds more than it should; says what is wrong with it."""


class DamagedError(UntrustedError):
    """A file is not as it was written."""


class IrregularError(OSError):
    """A path is no regular file, or one that is too large to be read."""


def read_regular(path: Path | str, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file; a pipe or a device could go on for ever.

    Raises:
        IrregularError: it is something else, or larger than `most_bytes`.
        OSError: it cannot be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise IrregularError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > most_bytes:
            raise IrregularError(errno.EFBIG, f"it is larger than {_size(most_bytes)}", str(path))
        return file.read(status.st_size)  # Python makes room for as many bytes as it is told


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} KiB"


def read_written(path: Path) -> bytes:
    """The content of a file that was just written: from the disk, where the system allows."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from memory
        return file.read()


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file (UTF-8).

    Raises:
        UntrustedError: it is missing, no regular file, too large, or no text.
        OSError: it cannot be read.
    """
    try:
        return read_regular(path, most_bytes).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UntrustedError(f"{path.name} is missing") from error
    except IrregularError as error:
        reason = str(error.strerror).removeprefix("it ")
        raise UntrustedError(f"{path.name} {reason}") from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path.name} is damaged") from error


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing if the file is not there.

    Raises:
        UntrustedError: it is damaged, no regular file, or too large.
        OSError: it cannot be read.
    """
    return _json(path, dict) if path.exists() else {}


def json_list(path: Path) -> list[Any]:
    """The list in a JSON file; nothing if the file is not there.

    Raises:
        UntrustedError: it is damaged, no regular file, or too large.
        OSError: it cannot be read.
    """
    return _json(path, list) if path.exists() else []


def _json(path: Path, kind: type[_T]) -> _T:
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedError(f"{path.name} is damaged") from error
    if not isinstance(value, kind):
        raise DamagedError(f"{path.name} is damaged")
    return value


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster


def yaml_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file that has no references: a few lines with them can mean gigabytes.

    Interpolations of OmegaConf are text here.

    Raises:
        UntrustedError: it is damaged, too large, has references, tags or endless nesting.
        OSError: it cannot be read.
    """
    text, depth = read_text(path, MOST_CONFIG), 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise UntrustedError(f"{path.name} has aliases, which metarun never writes")
            if depth > DEEPEST_CONFIG:
                raise UntrustedError(f"{path.name} is nested too deeply")
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise DamagedError(f"{path.name} is damaged") from error
    except UntrustedError:
        raise
    except ValueError as error:  # of a number or a date that is none
        raise DamagedError(f"{path.name} is damaged") from error
    if not isinstance(value, dict) or not value:
        raise DamagedError(f"{path.name} is damaged")
    return value
