"""What is wrong in a YAML file of the user's own, found while Hydra puts a config together."""

import re
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

import metarun
from metarun.errors import ConfigError


def file_of(error: BaseException) -> Path | None:
    """The YAML file that Hydra was merging when an error arose; None for other errors."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_compose_config_from_defaults_list":
            loaded, default = frame.f_locals.get("loaded"), frame.f_locals.get("default")
            if loaded is None or default is None or not str(loaded.path).startswith("file://"):
                return None
            return Path(loaded.path.removeprefix("file://")) / f"{default.config_path}.yaml"
    return None


def place(path: Path, key: str) -> str:
    """`path, line N`, where a dotted key (or the part of it that the file spells out) stands."""
    parts = key.split(".")
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return str(path)
    for start in range(len(parts)):  # the package of the file is not spelled out in it
        line = _line(tree, parts[start:])
        if line is not None:
            return f"{path}, line {line}"
    return str(path)


def _line(node: yaml.Node | None, parts: Sequence[str]) -> int | None:
    line = None
    for part in parts:
        if not isinstance(node, yaml.MappingNode):
            return None
        for name, value in node.value:
            if name.value == part:
                line, node = name.start_mark.line + 1, value
                break
        else:
            return None
    return line


def wrong_package(path: Path, key: str) -> ConfigError | None:
    """The error for a file whose content goes to a place where there are no settings.

    Args:
        key: where it went, as Hydra names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    named = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    if named and named[1] != "_global_" and named[1].split(".")[0] == key.split(".")[0]:
        return ConfigError(
            f"{path}: there is no group {named[1]!r} for its settings: write "
            "'# @package _global_' into its first line"
        )
    if named is None and key == path.parent.name and f"{key}:" not in text:
        return ConfigError(
            f"{path} lacks its first line: write '# @package _global_' there, else its settings "
            f"are looked for below {key!r}"
        )
    return None


def wrong_defaults(text: str, groups: Collection[str]) -> ConfigError | None:
    """The error for a defaults list that names a group where there is none, or for no configs.

    Args:
        text: what Hydra says.
        groups: those that there are.
    """
    if text.startswith("Primary config module"):
        return ConfigError(
            f"Python has found metarun's sources, in {Path(metarun.__file__).parent}, in place of "
            "what is installed, and they have no configs: start it in another folder, or install "
            "them with `pip install -e .`"
        )
    below = re.match(r"In '(.+)': Could not override '([\w/]+)@(.+)\.\2'", text)
    if below:
        return ConfigError(
            f"{below[1]}.yaml: its first line must be '# @package _global_', else the override of "
            f"{below[2]!r} in its defaults is looked for below {below[3]!r}"
        )
    missing = re.match(r"In '(.+)': Could not find '(?:.+/)?([\w-]+)/([^/']+)'", text)
    if missing and missing[2] in groups:
        group, option = missing[2], missing[3]
        return ConfigError(
            f"{missing[1]}.yaml: to choose {group}={option}, write '- override /{group}: {option}' "
            "in its defaults"
        )
    return None


def no_group(path: Path, groups: Collection[str]) -> str:
    """`path, line N: key`, where a file has a value in the place of a group of settings."""
    tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for name, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if name.value in groups and not isinstance(value, yaml.MappingNode):
            return f"{path}, line {name.start_mark.line + 1}: {name.value}"
    return str(path)


def unreadable(error: yaml.MarkedYAMLError) -> ConfigError:
    """The error for a file that is no YAML."""
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a YAML file"
    tab = "; YAML is indented by spaces, not by TABs" if "'\\t'" in str(error.problem) else ""
    return ConfigError(f"{where}: {error.problem or error.context}{tab}")
