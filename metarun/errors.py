"""Errors that a user can cause. The command line prints their message and nothing else."""


class MetarunError(Exception):
    """Base class; `exit_code` is the process's exit status when it ends a command."""

    exit_code = 1


class ConfigError(MetarunError):
    """The command or the config is wrong: nothing was started."""

    exit_code = 2


class RunError(MetarunError):
    """The run could not go on: data, disk, device or numbers failed."""


class DataError(RunError):
    """A dataset is missing, damaged or of an unknown layout."""


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, foreign or of a newer format."""


def explain(error: BaseException) -> tuple[str, int]:
    """What a person is told of the error that ended a command, and the exit status."""
    if isinstance(error, MetarunError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", 130
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
    # a defect of ours: still one line, and where to find more
    hint = "METARUN_DEBUG=1 shows where"
    return f"unexpected {type(error).__name__}: {error} ({hint})", 1
