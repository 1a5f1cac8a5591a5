"""How a component says what it is: `settings` marks its settings, `builds` what is made of them.

    @settings
    class MineConfig:
        '''What it is, in a line.'''

        width: int = 64  # what it means: --help shows it
        pool: Literal["stride", "max"] = "stride"  # the choices


    @builds(MineConfig)
    def mine(input_shape, outputs, own: MineConfig) -> nn.Module: ...

A component of metarun's own is such a file in `metarun/components/<group>`. Its place is its
registration, and its name is the file's. Imports neither torch nor Hydra.
"""

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from metarun.errors import ConfigError

HOME = "metarun.components."

Kind = TypeVar("Kind")
Result = TypeVar("Result")

_settings_of_ours: dict[tuple[str, str], type] = {}
"""Module and name of a class -> the class, since a file may be read before it is imported."""


@dataclass_transform()
def settings(kind: type[Kind]) -> type[Kind]:
    """Make a class the settings of a component: a dataclass whose choices are checked.

    A `Literal` says which values a setting may have. Hydra sees their plain type. The settings of
    a component of metarun's own have the field `name`, which is that of the file.
    """
    key = (kind.__module__, kind.__qualname__)
    if key in _settings_of_ours:
        return _settings_of_ours[key]
    group, _, name = kind.__module__.removeprefix(HOME).partition(".")
    made = section(f"{group}." if _is_ours(kind) else None, name if _is_ours(kind) else None)(kind)
    if _is_ours(kind):
        _settings_of_ours[key] = made
    return made


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(HOME)


@dataclass_transform()
def section(prefix: str | None, name: str | None = None) -> Callable[[type[Kind]], type[Kind]]:
    """As `settings`, for a part of the config that is no component.

    Args:
        prefix: what stands before the name of a setting on the command line, such as "trainer.";
            None: what it is for the class that this one inherits from.
        name: the default of a field `name` to be added.
    """

    def make(kind: Any) -> Any:
        hints = dict(vars(kind).get("__annotations__", {}))
        choices = {key: values for key, hint in hints.items() if (values := _literals(hint))}
        hints |= {key: _plain(hints[key]) for key in choices}
        if name is not None and "name" not in hints:
            hints, kind.name = {"name": str, **hints}, name
        kind.__annotations__ = hints
        if prefix is not None:
            kind._prefix = prefix
        kind._choices = getattr(kind, "_choices", {}) | choices
        # An interpolation may give anything, and the class's own checks look into these.
        containers = {key: origin for key, hint in hints.items() if (origin := _container(hint))}
        if choices or containers:
            own = vars(kind).get("__post_init__")
            kind.__post_init__ = _with_checks(kind, own, choices, containers)
        return dataclass(kind)

    return make


def _with_checks(
    kind: type,
    check: Callable[[Any], None] | None,
    choices: Mapping[str, tuple[Any, ...]],
    containers: Mapping[str, type],
) -> Callable[[Any], None]:
    """A `__post_init__` that looks at choices and containers, then goes on with the class's own."""

    def checked(self: Any) -> None:
        for key, origin in containers.items():
            if not isinstance(value := getattr(self, key), origin):
                prefix = getattr(self, "_prefix", "")
                raise ConfigError(f"{prefix}{key}={value}: must be a {origin.__name__}")
        for key, allowed in choices.items():
            if (value := getattr(self, key)) not in allowed:
                named = ", ".join(str(choice) for choice in allowed if choice is not None)
                prefix = getattr(self, "_prefix", "")
                raise ConfigError(f"{prefix}{key}={value}: choose one of {named}")
        inherited = getattr(super(kind, self), "__post_init__", None)
        if check is not None:
            check(self)
        elif inherited is not None:
            inherited()

    return checked


def with_name(schema: type, name: str) -> type:
    """The settings with a field `name` that has this default.

    Raises:
        ValueError: they have another one.
    """
    known = {f.name: f.default for f in fields(schema)}
    given = known.get("name", "???")
    if given == name:
        return schema
    if given != "???":  # what the bases have
        raise ValueError(f"the settings of {name!r} say name={given!r}: leave `name` out")
    namespace = {"__annotations__": {"name": str}, "name": name, "__module__": schema.__module__}
    return dataclass(type(schema.__name__, (schema,), namespace | {"__doc__": schema.__doc__}))


def choices_of(schema: type) -> dict[str, tuple[Any, ...]]:
    """Setting -> the values that it may have, for those that have a few."""
    found: dict[str, tuple[Any, ...]] = getattr(schema, "_choices", {})
    return {key: tuple(v for v in values if v is not None) for key, values in found.items()}


def _literals(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_literals(part) or (None,) for part in get_args(hint)]
        found = tuple(value for part in parts for value in part)
        return found if any(value is not None for value in found) else ()
    return ()


def _container(hint: Any) -> type | None:
    origin = get_origin(hint)
    return origin if origin in (list, dict) else None


def _plain(hint: Any) -> Any:
    """The type of a Literal's values."""
    values = _literals(hint)
    kind: Any = type(next(value for value in values if value is not None))
    return kind | None if None in values else kind


def takes(schema: type) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function be called with its settings as keywords, or as one object at the end.

    `load(OmniglotConfig(split="vinyals"))` and `load(split="vinyals")` are the same, and what is
    left out has the default that the settings state.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*given: Any, **changes: Any) -> Result:
            if not changes and given and isinstance(given[-1], schema):
                return function(*given)
            return function(*given, schema(**changes))

        call.takes = schema  # type: ignore[attr-defined]
        return call

    return decorate


def builds(schema: type) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Mark the function of a file that builds the component. It `takes` its settings."""
    return takes(schema)


_finders: dict[type, Callable[..., str]] = {}
"""Settings of a data set -> what says where its files are."""


def finds(schema: type) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Mark the function of a data set's file that says which of its files are there.

    It takes the settings, reads no content, and raises a `DataError` that says what is missing
    and how to get it.
    """

    def decorate(function: Callable[..., str]) -> Callable[..., str]:
        _finders[schema] = takes(schema)(function)
        return _finders[schema]

    return decorate


def finder_of(schema: type) -> Callable[..., str] | None:
    """What was marked by `finds` for these settings, in a file that is imported by now."""
    return _finders.get(schema)


def as_keywords(config: Any, *drop: str) -> dict[str, Any]:
    """A component's settings without its name (and without `drop`), as keyword arguments."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {key: value for key, value in values.items() if key not in ("name", *drop)}
