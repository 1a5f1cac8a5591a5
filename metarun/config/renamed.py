"""Old spellings: what a setting was called before, on command lines and in stored configs."""

import logging
import re
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

OPTIONS = {"inner_opt": {"mixed": "partition"}}
"""Group -> old name of an option -> its name today."""


def with_todays_names(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line with the names of today; an old one is told of."""
    return [_renamed(argument) for argument in arguments]


def _renamed(argument: str) -> str:
    group, equals, value = argument.partition("=")
    names = OPTIONS.get(group, {})
    if not equals or not names:
        return argument
    now = re.sub(r"[^,]+", lambda name: names.get(name[0], name[0]), value)
    if now != value:
        log.warning("%s=%s is called %s=%s now", group, value, group, now)
    return f"{group}={now}"


def with_todays_options(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config, a plain tree, with the names of today."""
    changed = dict(config)
    for group, names in OPTIONS.items():
        own = config.get(group)
        if isinstance(own, dict) and isinstance(name := own.get("name"), str) and name in names:
            changed[group] = own | {"name": names[name]}
    return changed
