"""What the command line knows of its settings, for `metarun <command> --help` and completion.

The texts are the docstrings of the schemas, the comments behind their fields and those at the top
of the YAML files, so there is one text for those who read the code or the configs and for those
who type `--help`.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from metarun.config.catalogue import GROUPS, schemas, source_of
from metarun.config.component import choices_of
from metarun.config.trained import EvalConfig

_USAGE = {
    "train": "metarun train [group=option …] [key=value …]",
    "eval": "metarun eval ckpt=<run directory or checkpoint file> [data=option] [key=value …]",
    "predict": (
        "metarun predict ckpt=<run directory or checkpoint file> support=<folder of class folders> "
        "query=<folder or pictures> [key=value …]"
    ),
    "explain": (
        "metarun explain ckpt=<run directory or checkpoint file> [support=<folder of class "
        "folders> query=<folder or pictures>] [key=value …]"
    ),
    "export": "metarun export ckpt=<run directory or checkpoint file> [key=value …]",
    "sensitivity": "metarun sensitivity ckpt=<run directory or checkpoint file> [key=value …]",
}
_FOOTERS = {
    "train": [
        ("hydra.run.dir=DIR", "sets the run directory; the same DIR again resumes the run"),
        ("hydra.sweep.dir=DIR", "sets the directory of a sweep; the same DIR again resumes it"),
        ("-m, --multirun", "runs every combination of values: -m seed=0,1,2 inner_opt.lr=0.1,0.4"),
        ("--cfg job", "prints the config and does nothing else"),
        ("--hydra-help", "Hydra's other options"),
    ],
    "eval": [
        ("hydra.run.dir=DIR", "sets where result.json goes"),
        ("--cfg job", "prints the config and does nothing else"),
        ("--hydra-help", "Hydra's other options"),
    ],
    "predict": [("--cfg job", "prints the config and does nothing else")],
    "explain": [("--cfg job", "prints the config and does nothing else")],
    "export": [("--cfg job", "prints the config and does nothing else")],
    "sensitivity": [("--cfg job", "prints the config and does nothing else")],
}
_INDENT = 32
_OF_ROWS = "# Written by scripts/write_conf.py from metarun/reproduction/rows/"
"""Begins a line of the experiments that are rows of published figures."""


class Setting(NamedTuple):
    """A key of the command line, its value as one would type it, what it means, what it may be."""

    key: str
    value: Any
    meaning: str
    choices: tuple[Any, ...] = ()

    def typed(self) -> str:
        """`key=value`."""
        return f"{self.key}={as_typed(self.value)}"


def command_help(command: str, what: str, config: Any) -> str:
    """The help text of a command, as wide as the terminal is (80 columns in a pipe).

    Args:
        command: "train", or one that uses a trained run.
        what: one line on what it does.
        config: its composed config, as dataclasses.
    """
    lines = [*_wrapped(f"metarun {command}: {what}"), ""]
    lines += [*_wrapped(f"usage: {_USAGE[command]}", behind="    "), ""]
    if described_groups := options(command):
        what = "groups and their options" if command == "train" else "data of another domain"
        lines += [f"{what}; * is what this command has:"]
        for group, described in described_groups.items():
            chosen = getattr(getattr(config, group, None), "name", None)
            rows = _rows() if group == "experiment" else set()
            lines.append("")
            for option, meaning in described.items():
                if option not in rows:
                    mark = "* " if option == chosen else "  "
                    lines += _entry(f"{group}={option}", meaning, mark)
            if rows:
                many = f"{len(rows)} protocols of published figures: metarun reproduce --list"
                lines += _entry(f"{group}=…", many)
        lines.append("")
    lines.append("settings, with the values that this command has:")
    for heading, own in _all_sections(config):
        lines += ["", *_wrapped(heading, "  # ", "  # ")]
        for setting in own:
            lines += _entry(setting.typed(), setting.meaning)
    lines.append("")
    for option, meaning in _FOOTERS[command]:
        lines += _entry(option, meaning)
    return "\n".join(lines)


def options(command: str = "train") -> dict[str, dict[str, str]]:
    """Group -> option -> one line on it: components, experiments, launchers and sweepers.

    An evaluation has those of its data, another domain; other uses of a trained run have none.
    """
    if command not in ("train", "eval"):
        return {}
    if command == "eval":
        return {"data": {name: _first_line(schema) for name, schema in schemas("data").items()}}
    found = {
        group: {name: _first_line(schema) for name, schema in schemas(group).items()}
        for group in GROUPS
    }
    for group, texts in _yaml_texts().items():
        if group not in found:
            found[group] = {option: _first_comment(text) for option, text in texts.items()}
    return found


def _rows() -> set[str]:
    """The experiments that are rows of published figures."""
    return {name for name, text in _yaml_texts()["experiment"].items() if _OF_ROWS in text}


@cache
def _yaml_texts() -> dict[str, dict[str, str]]:
    """Group -> option -> its YAML file. Experiments in a folder are options of `experiment`."""
    found: dict[str, dict[str, str]] = {}
    for place, folder in _folders(files("metarun.conf")):
        group, prefix = place, ""
        if place.startswith("experiment/"):
            group, prefix = "experiment", place.removeprefix("experiment/") + "/"
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.name.endswith(".yaml"):
                option = prefix + path.name.removesuffix(".yaml")
                found.setdefault(group, {})[option] = path.read_text(encoding="utf-8")
    return found


def settings(config: Any) -> list[Setting]:
    """Every setting of a composed config (a dataclass), top-level ones first."""
    return [setting for _, own in _all_sections(config) for setting in own]


def _all_sections(config: Any) -> list[tuple[str, list[Setting]]]:
    """Those of a config; for an evaluation also those of the other data that it names."""
    found = _sections(config)
    schema = schemas("data").get(str(config.data.name)) if isinstance(config, EvalConfig) else None
    if schema is not None:
        known = {setting.key for _, own in found for setting in own}
        title = f"data={config.data.name}: {_first_line(schema)}"
        heading, own = _sections(schema(), "data.", title)[0]
        found.append((heading, [setting for setting in own if setting.key not in known]))
    return found


def _sections(config: Any, prefix: str = "", heading: str = "") -> list[tuple[str, list[Setting]]]:
    comments = _comments(type(config))
    own, below = [], []
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        if is_dataclass(value):
            title = f"{prefix}{name}: {_first_line(type(value))}"
            below += _sections(value, f"{prefix}{name}.", title)
        elif not (prefix and name == "name"):  # chosen by the group, not set
            choices = choices_of(type(config)).get(name, ())
            meaning = _with_choices(comments.get(name, ""), choices)
            own.append(Setting(prefix + name, value, meaning, choices))
    return [(heading, own), *below]


def _with_choices(meaning: str, choices: tuple[Any, ...]) -> str:
    named = [str(value) for value in choices]
    return meaning if all(c in meaning for c in named) else f"{meaning} ({', '.join(named)})"


def _folders(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir() and not path.name.startswith("_"):
            yield prefix + path.name, path
            yield from _folders(path, f"{prefix}{path.name}/")


def _entry(what: str, meaning: str, indent: str = "  ") -> list[str]:
    text = textwrap.wrap(meaning, _width() - _INDENT) or [""]
    head = f"{indent}{what}"
    if len(head) <= _INDENT - 2:
        head, text = f"{head:{_INDENT}}{text[0]}".rstrip(), text[1:]
    return [head, *(" " * _INDENT + line for line in text if line)]


def _wrapped(text: str, first: str = "", behind: str = "") -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=first, subsequent_indent=behind)


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 100))


def as_typed(value: Any) -> str:
    """A value as one would type it behind `key=`."""
    if isinstance(value, list):
        return "[" + ",".join(as_typed(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_typed(item)}" for key, item in value.items()) + "}"
    return str(OmegaConf.to_yaml({"v": value})).removeprefix("v: ").strip().strip("'")


def _first_line(schema: type) -> str:
    return (inspect.getdoc(schema) or "").partition("\n")[0]


def _first_comment(text: str) -> str:
    """The first sentence of a YAML file's comments."""
    comment = " ".join(re.findall(r"^# (?!@package)(.*)", text, re.MULTILINE))
    return re.split(r"(?<=\.)\s", comment)[0]


def _comments(schema: type) -> dict[str, str]:
    """Field -> the comment behind it, own fields before inherited ones."""
    found: dict[str, str] = {}
    for kind in reversed([k for k in schema.__mro__ if is_dataclass(k)]):
        for line in source_of(kind).splitlines():
            if match := re.match(r"    (\w+): .*?  # (.*)", line):
                found[match.group(1)] = match.group(2)
    return found
