"""Checks of settings: each raises a ConfigError that says what is allowed."""

import math
from typing import Any

from metarun.errors import ConfigError


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


def positive(key: str, value: float | None) -> None:
    """Refuse a value that is given but not above 0, or not finite."""
    finite(key, value)
    if value is not None and not value > 0:
        raise ConfigError(f"{key}={value}: must be above 0")
