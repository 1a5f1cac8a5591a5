"""What the settings of all inner optimizers have in common, and clipping."""

from collections.abc import Callable, Mapping
from dataclasses import field, fields, replace
from typing import Any, Literal

from metarun.config.checks import BELOW_ONE, MOST_STEPS, at_least, between, finite, positive
from metarun.config.component import as_keywords, settings
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, clip_norm, clip_value

OF_THE_ALGORITHM = ("schedule", "min_lr", "schedule_steps", "precondition")
"""Settings that the inner loop follows; the optimizer itself has no use for them."""

OF_EVERY_INNER_OPTIMIZER = ("learn", "granularity", "groups", *OF_THE_ALGORITHM)

Preconditioning = Literal["meta_curvature", "kronecker", "kronecker_psd"]
Granularity = Literal["global", "parameter", "step", "parameter_step"]

_SETTING_OF = {"max_norm": "clip_norm"}  # hyperparameters that settings call otherwise


@settings
class InnerOptConfig:
    """What every inner optimizer has: groups, and hyperparameters that are learned."""

    name: str = "???"
    learn: list[str] = field(default_factory=list)  # e.g. [lr]: becomes a meta-parameter
    granularity: Granularity = "global"  # what has a value of its own, where some are learned
    groups: list[dict[str, Any]] = field(default_factory=list)  # e.g. [{params: head.*, lr: 0.1}]

    def __post_init__(self) -> None:
        for own in fields(self):
            finite(f"inner_opt.{own.name}", getattr(self, own.name))
        for group in self.groups:
            check_group(group)
        patterns = [group["params"] for group in self.groups]
        if len(set(patterns)) < len(patterns):
            raise ConfigError(f"inner_opt.groups: two groups for one pattern in {patterns}")
        if self.groups:
            replace(self, groups=[])  # before the groups: what is wrong without is not theirs
        for group in self.groups:
            changes = {key: value for key, value in group.items() if key != "params"}
            try:
                self.check_changes(changes)
            except ConfigError as error:
                reason = str(error).removeprefix("inner_opt.")
                raise ConfigError(f"inner_opt.groups, {group['params']}: {reason}") from error

    def check_changes(self, changes: Mapping[str, float]) -> None:
        """Refuse hyperparameters that these settings would not allow in place of their own.

        Names that are no setting pass: what the optimizer has is known when it is built.

        Raises:
            ConfigError: a value that is not allowed.
        """
        of_all = {*(f.name for f in fields(InnerOptConfig)), *OF_THE_ALGORITHM}
        own = {f.name for f in fields(self)} - of_all
        named: dict[str, Any] = {_SETTING_OF.get(k, k): value for k, value in changes.items()}
        replace(self, groups=[], **{k: value for k, value in named.items() if k in own})


@settings
class InnerGradientConfig(InnerOptConfig):
    """What every inner optimizer has that is driven by the gradient alone."""

    lr: float = 0.01  # learning rate of the inner loop
    weight_decay: float = 0.0  # pulls the parameters towards zero
    clip_norm: float | None = None  # inner gradients are scaled down to this norm (max_norm)
    clip_value: float | None = None  # inner gradients are clipped elementwise to ± this
    schedule: Literal["cosine", "linear"] | None = None  # from lr to min_lr over the inner steps
    min_lr: float = 0.0  # where a schedule ends
    schedule_steps: int | None = None  # inner steps until then; null: those of training
    precondition: Preconditioning | None = None  # a learned linear map of the inner gradients

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "weight_decay", "momentum", "eps", "lr_decay", "momentum_decay"):
            at_least(f"inner_opt.{name}", getattr(self, name, 0), 0)
        for name in ("beta1", "beta2"):
            between(f"inner_opt.{name}", getattr(self, name, 0), 0, BELOW_ONE)
        positive("inner_opt.clip_norm", self.clip_norm)
        positive("inner_opt.clip_value", self.clip_value)
        between("inner_opt.min_lr", self.min_lr, 0, self.lr)
        if self.schedule_steps is not None:
            between("inner_opt.schedule_steps", self.schedule_steps, 1, MOST_STEPS)


def clipped(make: Callable[..., InnerOptimizer], own: InnerGradientConfig) -> InnerOptimizer:
    """An optimizer of `metarun.unroll` by its settings, behind the clipping that they ask for."""
    optimizer = make(**as_keywords(own, *OF_EVERY_INNER_OPTIMIZER, "clip_norm", "clip_value"))
    # The one put on last acts first: by value, then by norm, like the outer gradients.
    if own.clip_norm is not None:
        optimizer = clip_norm(optimizer, own.clip_norm)
    return optimizer if own.clip_value is None else clip_value(optimizer, own.clip_value)


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that is not a pattern with numbers."""
    example = "expected e.g. {params: head.*, lr: 0.1}"
    if not isinstance(group.get("params"), str):
        raise ConfigError(f"inner_opt.groups: {group} names no parameters; {example}")
    values = [value for key, value in group.items() if key != "params"]
    if not values or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"inner_opt.groups: the settings of {group} must be numbers; {example}")
