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
