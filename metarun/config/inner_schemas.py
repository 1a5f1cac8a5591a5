"""The settings of each inner optimizer. Imports neither torch nor Hydra."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from metarun.config.checks import at_least, fits, positive
from metarun.config.inner_torch_schemas import TORCH_SCHEMAS, InnerOptConfig
from metarun.errors import ConfigError


@dataclass
class InnerNewtonConfig(InnerOptConfig):
    """Newton's method, for the parameters of a head."""

    name: str = "newton"
    trust_radius: float | None = 1.0  # length of the longest step; null: no bound
    damping: float = 0.0  # added to the curvature; for a head alone 0.01 may replace the radius
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

    def check_changes(self, changes: Mapping[str, float]) -> None:
        """As for one optimizer, with the hyperparameters of part i called "i.<name>"."""
        for index, part in enumerate(self.parts):
            prefix = f"{index}."
            own = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
            try:
                part_settings(part)[1].check_changes(own)
            except ConfigError as error:
                raise ConfigError(prefix + str(error).removeprefix("inner_opt.")) from error


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
    if not patterns or not fits(patterns, list[str]):
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
        if not fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", hints[key])
            raise ConfigError(f"inner_opt.parts: {key}={value} of {name}: must be {wanted}")
    try:
        settings: InnerOptConfig = schema(**given)
    except ConfigError as error:
        reason = str(error).removeprefix("inner_opt.")
        raise ConfigError(f"inner_opt.parts, {name}: {reason}") from error
    return patterns, settings


INNER_SCHEMAS: dict[str, type] = {
    **TORCH_SCHEMAS,
    "newton": InnerNewtonConfig,
    "mixed": InnerMixedConfig,
}
"""Inner optimizer -> its schema."""
