"""What the settings of all outer optimizers have in common."""

from dataclasses import field, fields
from typing import Any, Literal

from metarun.config.checks import BELOW_ONE, at_least, between, finite, positive
from metarun.config.component import settings
from metarun.errors import ConfigError

OF_EVERY_OUTER_OPTIMIZER = ("schedule", "min_lr", "clip_norm", "clip_value", "groups")
"""Settings that the outer step follows; the optimizer itself has no use for them."""

IMPLEMENTATION: dict[str, Any] = {"fused": True}
"""How torch is to take the outer step: in one kernel. It is in param groups, but no setting."""


@settings
class OuterOptConfig:
    """What every outer optimizer has."""

    name: str = "???"
    lr: float = 0.001  # learning rate of the outer loop
    weight_decay: float = 0.0  # not applied to learned inner hyperparameters
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: from lr to min_lr at the end
    min_lr: float = 0.0  # where cosine ends
    clip_norm: float | None = None  # meta-gradients are scaled down to this global norm
    clip_value: float | None = None  # meta-gradients are clipped elementwise to ± this
    groups: list[dict[str, Any]] = field(default_factory=list)  # [{params: head.*, lr_factor: 10}]

    def __post_init__(self) -> None:
        for own in fields(self):
            finite(f"outer_opt.{own.name}", getattr(self, own.name))
        positive("outer_opt.lr", self.lr)
        for name in ("weight_decay", "momentum", "eps"):
            at_least(f"outer_opt.{name}", getattr(self, name, 0.0), 0)
        for name in ("beta1", "beta2"):
            between(f"outer_opt.{name}", getattr(self, name, 0.0), 0, BELOW_ONE)
        between("outer_opt.min_lr", self.min_lr, 0, self.lr)
        positive("outer_opt.clip_norm", self.clip_norm)
        positive("outer_opt.clip_value", self.clip_value)
        for group in self.groups:
            check_group(group)
            if self.min_lr > self.lr * group["lr_factor"]:
                raise ConfigError(
                    f"outer_opt.min_lr={self.min_lr}: must be from 0 to the learning rate of "
                    f"{group['params']}, {self.lr * group['lr_factor']:g}"
                )


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group that is not a pattern and a factor of the learning rate.

    Raises:
        ConfigError: says what it must be.
    """
    factor, example = group.get("lr_factor"), "{params: head.*, lr_factor: 10}"
    if group.keys() != {"params", "lr_factor"} or not isinstance(group["params"], str):
        raise ConfigError(f"outer_opt.groups: {group} is no group; expected e.g. {example}")
    if type(factor) not in (int, float):
        raise ConfigError(f"outer_opt.groups: lr_factor of {group} must be a number")
    positive(f"outer_opt.groups, {group['params']}: lr_factor", factor)
