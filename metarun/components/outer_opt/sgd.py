"""Stochastic gradient descent, torch's own."""

from typing import Any

import torch

from metarun.components.outer_opt.base import (
    IMPLEMENTATION,
    OF_EVERY_OUTER_OPTIMIZER,
    OuterOptConfig,
)
from metarun.config.component import as_keywords, builds, settings
from metarun.errors import ConfigError


@settings
class OuterSgdConfig(OuterOptConfig):
    """Stochastic gradient descent, torch's own."""

    lr: float = 0.01  # learning rate of the outer loop
    momentum: float = 0.0  # share of the previous step that is kept
    nesterov: bool = False  # Nesterov momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ConfigError("outer_opt.nesterov=true: needs a momentum above 0")


@builds(OuterSgdConfig)
def sgd(params: Any, own: OuterSgdConfig) -> torch.optim.Optimizer:
    """`torch.optim.SGD` over parameters, or param groups."""
    return torch.optim.SGD(params, **as_keywords(own, *OF_EVERY_OUTER_OPTIMIZER), **IMPLEMENTATION)
