"""Errors that a user can cause. The command line prints their message and nothing else."""

import difflib
from collections.abc import Iterable


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
        return printable(str(error)), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", 130
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is no folder", 1
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error).rstrip('.')}. {_LESS_MEMORY}", 1
    if is_about_a_model(error):
        return printable(str(error)), 1
    # a defect of ours: still one line, and where to find more
    hint = "METARUN_DEBUG=1 shows where"
    return f"unexpected {type(error).__name__}: {printable(str(error))} ({hint})", 1


_ABOUT_MODELS = {"UnsuitableModel", "ClosureError", "WrongDerivative"}
"""They are no MetarunErrors: the unroll is a library of its own."""

_LESS_MEMORY = (
    "A smaller engine.chunk (auto: as many tasks at a time as fit, under vmap), "
    "trainer.meta_batch, task.query or backbone needs less, as does engine.gradient=checkpoint in "
    "training, and on a GPU engine.cuda_graphs=false"
)


def is_about_a_model(error: BaseException) -> bool:
    """Whether an error of the unroll says what to change in a model. Imports no torch."""
    return bool(_ABOUT_MODELS & {kind.__name__ for kind in type(error).__mro__})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the system or CUDA has no more memory to give, or an error came of that.

    Imports no torch.
    """
    words = ("can't allocate memory", "std::bad_alloc", "out of memory", "STATUS_ALLOC_FAILED")
    cause: BaseException | None = error
    seen = set[int]()
    while cause is not None and id(cause) not in seen:  # an error may be the cause of its cause
        seen.add(id(cause))
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, RuntimeError) and any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if there is none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """' (did you mean X?)' with the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def printable(message: str) -> str:
    """A message whose control characters are spelled out: parts of it may come from a file.

    Line breaks stay, but none that would make the rest look like another message of ours.
    """
    message = message.replace("\nmetarun:", "\\nmetarun:")
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)


def printable_name(name: object) -> str:
    """A name, in one line, whose control characters are spelled out."""
    return printable(str(name)).replace("\n", "\\n")
