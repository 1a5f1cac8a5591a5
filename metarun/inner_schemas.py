"""The settings of each inner optimizer. Imports neither torch nor Hydra."""

import types
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from metarun.checks import at_least, between, one_of, positive
from metarun.errors import ConfigError


@dataclass
class InnerOptConfig:
    """What every inner optimizer has: groups, and hyperparameters that are learned."""

    name: str = "???"
    learn: list[str] = field(default_factory=list)  # e.g. [lr]: becomes a meta-parameter
    granularity: str = "global"  # global, parameter, step or parameter_step: one value for each
    groups: list[dict[str, Any]] = field(default_factory=list)  # e.g. [{params: head.*, lr: 0.1}]

    def __post_init__(self) -> None:
        for group in self.groups:
            check_group(group)
        patterns = [group["params"] for group in self.groups]
        if len(set(patterns)) < len(patterns):
            raise ConfigError(f"inner_opt.groups: two groups for one pattern in {patterns}")
        one_of(
            "inner_opt.granularity",
            self.granularity,
            ("global", "parameter", "step", "parameter_step"),
        )


@dataclass
class InnerSgdConfig(InnerOptConfig):
    """Stochastic gradient descent."""

    name: str = "sgd"
    lr: float = 0.4
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "momentum", "weight_decay"):
            at_least(f"inner_opt.{name}", getattr(self, name), 0)
        between("inner_opt.dampening", self.dampening, 0, 1)


@dataclass
class InnerAdamConfig(InnerOptConfig):
    """Adam, differentiable."""

    name: str = "adam"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "weight_decay"):
            at_least(f"inner_opt.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            between(f"inner_opt.{name}", getattr(self, name), 0, 1 - 1e-9)
        positive("inner_opt.eps", self.eps)


@dataclass
class InnerNewtonConfig(InnerOptConfig):
    """Newton's method, for the parameters of a head."""

    name: str = "newton"
    trust_radius: float | None = 1.0  # length of the longest step; null: no bound
    damping: float = 0.0  # added to the curvature
    joint: bool = True  # all parameters are one variable; false: each row by itself

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("inner_opt.trust_radius", self.trust_radius)
        at_least("inner_opt.damping", self.damping, 0)


@dataclass
class InnerMixedConfig(InnerOptConfig):
    """Different inner optimizers for different parameters."""

    name: str = "mixed"
    parts: list[dict[str, Any]] = field(  # each: params, name of an optimizer, its settings
        default_factory=lambda: [
            {"params": "body.*", "name": "sgd", "lr": 0.4},
            {"params": "head.*", "name": "newton"},
        ]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError(f"inner_opt.parts is empty; {_PART_EXAMPLE}")
        for part in self.parts:
            part_settings(part)


_PART_EXAMPLE = (
    "expected e.g. [{params: body.*, name: sgd, lr: 0.4}, {params: head.*, name: newton}]"
)
_OF_THE_WHOLE = [f.name for f in fields(InnerOptConfig)]


def part_settings(part: dict[str, Any]) -> tuple[list[str], InnerOptConfig]:
    """The name patterns of a part of a mixed optimizer, and its own optimizer's settings.

    Raises:
        ConfigError: the part is not a mapping of that form, or a setting is not allowed.
    """
    given = dict(part)
    patterns, name = given.pop("params", None), given.pop("name", None)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not patterns:
        raise ConfigError(f"inner_opt.parts: {part} names no parameters; {_PART_EXAMPLE}")
    choices = [choice for choice in INNER_SCHEMAS if choice != "mixed"]
    if name not in choices:
        raise ConfigError(
            f"inner_opt.parts: {part} needs the name of an optimizer: one of {', '.join(choices)}"
        )
    schema = INNER_SCHEMAS[name]
    hints = {k: v for k, v in get_type_hints(schema).items() if k not in _OF_THE_WHOLE}
    for key, value in given.items():
        if key not in hints:
            raise ConfigError(
                f"inner_opt.parts: {name} has no setting {key!r}; it has {', '.join(hints)}"
            )
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", hints[key])
            raise ConfigError(f"inner_opt.parts: {key}={value} of {name}: must be {wanted}")
    try:
        settings: InnerOptConfig = schema(**given)
    except ConfigError as error:
        reason = str(error).removeprefix("inner_opt.")
        raise ConfigError(f"inner_opt.parts, {name}: {reason}") from error
    return patterns, settings


def _fits(value: Any, hint: Any) -> bool:
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) is int:
        return int in kinds or float in kinds
    return any(type(value) is (get_origin(kind) or kind) for kind in kinds)


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that is not a pattern with numbers."""
    example = "expected e.g. {params: head.*, lr: 0.1}"
    if not isinstance(group.get("params"), str):
        raise ConfigError(f"inner_opt.groups: {group} names no parameters; {example}")
    values = [value for key, value in group.items() if key != "params"]
    if not values or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"inner_opt.groups: the settings of {group} must be numbers; {example}")


INNER_SCHEMAS: dict[str, type] = {
    "sgd": InnerSgdConfig,
    "adam": InnerAdamConfig,
    "newton": InnerNewtonConfig,
    "mixed": InnerMixedConfig,
}
"""Inner optimizer -> its schema."""
