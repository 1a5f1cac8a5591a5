"""Different inner optimizers for different parameters."""

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, get_type_hints

from metarun.components.inner_opt.base import (
    OF_EVERY_INNER_OPTIMIZER,
    OF_THE_ALGORITHM,
    InnerOptConfig,
)
from metarun.config.catalogue import builder, schemas
from metarun.config.checks import fits
from metarun.config.component import as_keywords, builds, settings
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, LossOptimizer, optim


@settings
class PartitionConfig(InnerOptConfig):
    """Different inner optimizers for different parameters."""

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
_OF_THE_WHOLE = [*(f.name for f in fields(InnerOptConfig)), *OF_THE_ALGORITHM]


def part_settings(part: dict[str, Any]) -> tuple[list[str], InnerOptConfig]:
    """The name patterns of a part, and its own optimizer's settings.

    Raises:
        ConfigError: the part is not a mapping of that form, or a setting is not allowed.
    """
    given = dict(part)
    patterns, name = given.pop("params", None), given.pop("name", None)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns or not fits(patterns, list[str]):
        raise ConfigError(f"inner_opt.parts: {part} names no parameters; {_PART_EXAMPLE}")
    known = schemas("inner_opt")
    choices = [choice for choice in known if choice != "partition"]
    if name not in choices:
        raise ConfigError(
            f"inner_opt.parts: {part} needs the name of an optimizer: one of {', '.join(choices)}"
        )
    schema = known[name]
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
        own: InnerOptConfig = schema(**given)
    except ConfigError as error:
        reason = str(error).removeprefix("inner_opt.")
        raise ConfigError(f"inner_opt.parts, {name}: {reason}") from error
    return patterns, own


@builds(PartitionConfig)
def partition(own: PartitionConfig) -> InnerOptimizer | LossOptimizer:
    """Each part's optimizer for the parameters that its patterns name.

    Gradient-driven parts alone make a whole that is: every gradient mode serves it.
    """
    built = []
    for part in own.parts:
        patterns, config = part_settings(part)
        keywords = as_keywords(config, *OF_EVERY_INNER_OPTIMIZER)
        built.append((patterns, builder("inner_opt", config.name)(**keywords)))
    loss_driven = any(isinstance(optimizer, LossOptimizer) for _, optimizer in built)
    return optim.mixed(built) if loss_driven else optim.partition(built)
