"""What the settings of all outer optimizers have in common."""

from dataclasses import fields
from typing import Any, Literal

from metarun.config.checks import between, finite, positive
from metarun.config.component import settings

OF_EVERY_OUTER_OPTIMIZER = ("schedule", "min_lr", "clip_norm", "clip_value")
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

    def __post_init__(self) -> None:
        for own in fields(self):
            finite(f"outer_opt.{own.name}", getattr(self, own.name))
        positive("outer_opt.lr", self.lr)
        between("outer_opt.min_lr", self.min_lr, 0, self.lr)
        positive("outer_opt.clip_norm", self.clip_norm)
        positive("outer_opt.clip_value", self.clip_value)
