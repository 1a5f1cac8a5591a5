"""What is typed on a command line: paths as they stand, and values as one would type them again.

Hydra's grammar refuses a path with `~`, `=`, `#`, parentheses or letters beyond ASCII unless it is
quoted once more within the quotes of the shell. The settings that are paths need none of that.
"""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from metarun.config.catalogue import schemas
from metarun.config.trained import EvalAlgo, EvalData
from metarun.errors import ConfigError, did_you_mean

FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
PATHS = ("ckpt", "data.root", "backbone.weights", "support", "query", "out", "sheet", *FOLDERS)
SEVERAL = ("query",)
"""Those that may be a list of paths, `[a,b]`."""


def with_more(arguments: Sequence[str]) -> list[str]:
    """The arguments of `metarun eval`, in which the run's own settings go where they are kept.

    `algo.…`, `data.…` and `inner_opt.…` may be any setting of what the checkpoint names. Which
    those are is known when it is read: until then they are entries of `more`. `data=…` is the name
    of another data set.

    Raises:
        ConfigError: there is no data set of that name.
    """
    known = {
        "algo": {f.name for f in fields(EvalAlgo)},
        "data": {f.name for f in fields(EvalData)},
        "inner_opt": set(),
    }

    def moved(argument: str) -> str:
        if argument.lstrip("+").startswith("data="):
            text = argument.partition("=")[2]
            for name in text.split(","):  # as a sweep has them
                check_data(name.strip("'\" "))
            return f"data.name={text}"
        group, dot, rest = argument.lstrip("+").partition(".")
        name, equals, _ = rest.partition("=")
        own = group in known and name not in known[group]
        return f"+more.{group}.{rest}" if dot and equals and own else argument

    return [moved(argument) for argument in arguments]


def check_data(name: str) -> None:
    """Refuse a name that no data set has.

    Raises:
        ConfigError: says which there are.
    """
    if name not in schemas("data"):
        hint = did_you_mean(name, schemas("data"), prefix="data=")
        raise ConfigError(
            f"data={name}: there is no such option{hint}; choose from {', '.join(schemas('data'))}"
        )


def with_paths(arguments: Sequence[str], multirun: bool) -> list[str]:
    """The arguments, with paths quoted for Hydra where it would not read them as they stand.

    `~` is the home folder, as behind a space in a shell. Text that Hydra reads keeps its meaning:
    `${…}` is replaced, quotes around a value are dropped, and with `-m` commas separate values.

    Args:
        multirun: whether those that are no folders of runs may have several values.

    Raises:
        ConfigError: a path is empty, or `~name` names no user.
    """
    return [_with_path(argument, multirun) for argument in arguments]


def _with_path(argument: str, multirun: bool) -> str:
    key, equals, text = argument.partition("=")
    name = key.lstrip("+")
    if name not in PATHS or not equals:
        return argument
    if not text.strip("'\" "):  # it would mean the current folder
        raise ConfigError(f"{name}= is empty: name a folder, . for the current one")
    if name in FOLDERS and "\\${" in text:
        raise ConfigError(f"{argument}: a folder with ${{ in its name cannot be used for this")
    several = multirun and name not in FOLDERS
    override = _read(argument)
    if override is None:
        paths = text.split(",") if several else [text]
        return f"{key}=" + ",".join(quoted(expanded(name, path)) for path in paths)
    if override.is_sweep_override():
        literal = name in FOLDERS or Path(expanded(name, text)).exists()
        return f"{key}={quoted(expanded(name, text))}" if literal and not several else argument
    value = override.value()
    if value is None:
        return argument
    if isinstance(value, str):
        path = expanded(name, value)
        return argument if path == value else f"{key}={quoted(path)}"
    if name in SEVERAL and isinstance(value, list) and not Path(text).exists():
        return argument
    return f"{key}={quoted(text.strip())}"  # what reads as a number or a list is a name here


def _read(argument: str) -> Any:
    """Hydra's reading of an argument; None if it cannot read it."""
    # Here, because `metarun report` answers without waiting for Hydra.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def expanded(name: str, text: str) -> str:
    """A path with the home folder in the place of `~`.

    Args:
        name: the setting, for the message.

    Raises:
        ConfigError: there is no such user.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = text.partition("/")[0]
        raise ConfigError(f"{name}={text}: there is no user {user[1:]!r}; a folder is ./{text}")
    return path


def quoted(text: str) -> str:
    """Text in quotes that Hydra takes away again; `${…}` in it keeps its meaning."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)  # backslashes count before a quote only
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def without_interpolations(text: str) -> str:
    """Text for Hydra in which `${…}` is what it is."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def as_argument(key: str, path: object) -> str:
    """`key=path` as one types it in a shell, for a key of `PATHS`."""
    text = as_path(path)
    plain = f"{key}={without_interpolations(text)}"
    override = _read(_with_path(plain, multirun=False))
    if override is None or override.is_sweep_override() or override.value() != text:
        plain = f"{key}={quoted(without_interpolations(text))}"
    return shlex.quote(plain)


def as_path(path: object) -> str:
    """A path that no program takes for an option, nor for one in somebody's home folder."""
    text = str(path)
    return f"./{text}" if text.startswith(("-", "~")) else text


def unreadable(argument: str) -> ConfigError:
    """The error for an argument that Hydra cannot read, with what to type in its place."""
    key, equals, value = argument.partition("=")
    hint = ""
    if equals and key.strip():
        exact = shlex.quote(f"{key}={quoted(value)}")
        hint = f"; as text this very value is typed {exact}"
        if re.search(r"[,(]", value):
            hint = f", with -m also key=a,b,c or key=range(0,3){hint}"
    return ConfigError(f"cannot read the argument {argument!r}: expected key=value{hint}")
