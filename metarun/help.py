"""`metarun <command> --help`: every setting, its value and what it means.

The meanings are the comments behind the fields of the schemas, so there is one text for those
who read the code and those who type `--help`.
"""

import inspect
import re
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from metarun.config import SCHEMAS

_FOOTERS = {
    "train": """\
hydra.run.dir=DIR  sets the run directory; the same DIR again resumes the run
-m, --multirun     runs every combination of values: -m seed=0,1,2 inner_opt.lr=0.1,0.4
--cfg job          prints the config and does nothing else
--hydra-help       Hydra's other options""",
    "eval": """\
hydra.run.dir=DIR  sets where result.json goes
--hydra-help       Hydra's other options""",
}


def command_help(command: str, what: str, config: Any) -> str:
    """The help text of a command.

    Args:
        command: "train" or "eval".
        what: one line on what it does.
        config: its composed config, as dataclasses.
    """
    if command == "train":
        usage = "metarun train [group=option …] [key=value …]"
        lines = ["groups and their options:"]
        lines += [f"  {group}={'|'.join(schemas)}" for group, schemas in SCHEMAS.items()]
        lines += [f"  experiment={'|'.join(experiments())}", ""]
    else:
        usage, lines = "metarun eval ckpt=<run directory or checkpoint file> [key=value …]", []
    heading = "settings, with the values that this command would use:"
    parts = [f"metarun {command}: {what}", "", f"usage: {usage}", "", *lines, heading]
    return "\n".join([*parts, *_described(config), "", _FOOTERS[command]])


def experiments() -> list[str]:
    """The names of the ready-made experiments."""
    folder = files("metarun.conf").joinpath("experiment")
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir())


def _described(config: Any, prefix: str = "") -> list[str]:
    lines = []
    comments = _comments(type(config))
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        if is_dataclass(value):
            summary = (inspect.getdoc(type(value)) or "").partition("\n")[0]
            lines += ["", f"  # {prefix}{name}: {summary}", *_described(value, f"{prefix}{name}.")]
        elif not (prefix and name == "name"):  # chosen by the group, not set
            setting = f"  {prefix}{name}={_as_typed(value)}"
            lines.append(f"{setting:40}  {comments.get(name, '')}".rstrip())
    return lines


def _as_typed(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_as_typed(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_as_typed(item)}" for key, item in value.items()) + "}"
    return str(OmegaConf.to_yaml({"v": value})).removeprefix("v: ").strip().strip("'")


def _comments(schema: type) -> dict[str, str]:
    """Field -> the comment behind it, own fields before inherited ones."""
    found: dict[str, str] = {}
    for kind in reversed([k for k in schema.__mro__ if is_dataclass(k)]):
        for line in inspect.getsource(kind).splitlines():
            if match := re.match(r"    (\w+): .*?  # (.*)", line):
                found[match.group(1)] = match.group(2)
    return found
