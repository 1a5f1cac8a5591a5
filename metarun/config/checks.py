"""Checks of settings: each raises a ConfigError that says what is allowed."""

import math
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from metarun.errors import ConfigError

Config = TypeVar("Config")

# Far beyond what anybody means, and near enough that arithmetic stays within 64 bits.
MOST_STEPS = 10**5
MOST_UNITS = 10**6

BELOW_ONE = 1 - 1e-9
"""The most of what must stay below 1, such as the decay of an average."""


def one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise ConfigError(f"{key}={value}: choose one of {choices}")


def finite(key: str, value: Any) -> None:
    """Refuse numbers that are infinite or none at all; other values pass."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number")


def at_least(key: str, value: float, least: float) -> None:
    """Refuse a value that is too small, or not finite."""
    finite(key, value)
    if value < least:
        raise ConfigError(f"{key}={value}: must be {least} or more")


def between(key: str, value: float, least: float, most: float) -> None:
    """Refuse a value outside a range."""
    finite(key, value)
    if not least <= value <= most:
        raise ConfigError(f"{key}={value}: must be from {least} to {most}")


def one_each(key: str, values: list[int], what: str, count: int, most: int) -> None:
    """Refuse a list that has not a number from 1 to `most` for each of some things.

    Args:
        what: what each number is of, in the singular.
        count: how many there are of these.
    """
    if len(values) != count:
        raise ConfigError(f"{key}={values}: must have {count} numbers, one a {what}")
    for value in values:
        between(key, value, 1, most)


def positive(key: str, value: float | None) -> None:
    """Refuse a value that is given but not above 0, or not finite."""
    finite(key, value)
    if value is not None and not value > 0:
        raise ConfigError(f"{key}={value}: must be above 0")


def absolute(folder: str | None) -> str | None:
    """A folder as a run keeps it: it may be resumed in another current folder."""
    return None if folder is None else str(Path(os.path.expanduser(folder)).absolute())


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type, and what it holds as well.

    Whole numbers pass for floats, truth values do not pass for numbers. Types that plain values
    cannot have are left to the component that asks for them.
    """
    origin = get_origin(hint)
    if origin in (types.UnionType, Union):
        return any(fits(value, kind) for kind in get_args(hint))
    if origin is list:
        return type(value) is list and all(fits(item, get_args(hint)[0]) for item in value)
    if origin is dict:
        key_hint, item_hint = get_args(hint)
        return type(value) is dict and all(
            fits(key, key_hint) and fits(item, item_hint) for key, item in value.items()
        )
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (bool, int, str, list, dict, types.NoneType) else True


def check_types(name: str, config: Any) -> None:
    """Refuse a setting of a dataclass that is not of its type: Hydra lets lists in lists pass."""
    for key, hint in get_type_hints(type(config)).items():
        _check_type(f"{name}.{key}", getattr(config, key), hint)


def read(name: str, schema: type[Config], values: Any) -> Config:
    """The dataclass of plain values, each of its type.

    Raises:
        ConfigError: a value is not allowed, not of its type or for no setting there is, or a
            setting without default is missing.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected settings, not {brief(values)}")
    hints = get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{name} has no setting {brief(key)}")
        _check_type(f"{name}.{key}", value, hints[key])
    return schema(**values)


def brief(value: Any) -> str:
    """A value as it is shown in a message, however long it may be."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        wanted = getattr(hint, "__name__", None) if get_origin(hint) is None else None
        raise ConfigError(f"{key}={brief(value)}: must be {wanted or hint}")
