"""Adam (Kingma and Ba 2015), torch's own."""

from typing import Any

import torch

from metarun.components.outer_opt.base import (
    IMPLEMENTATION,
    OF_EVERY_OUTER_OPTIMIZER,
    OuterOptConfig,
)
from metarun.config.component import as_keywords, builds, settings


@settings
class OuterAdamConfig(OuterOptConfig):
    """Adam, torch's own."""

    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero


@builds(OuterAdamConfig)
def adam(params: Any, own: OuterAdamConfig) -> torch.optim.Optimizer:
    """`torch.optim.Adam` over parameters, or param groups."""
    return torch.optim.Adam(params, **torch_options(own), **IMPLEMENTATION)


def torch_options(own: OuterAdamConfig) -> dict[str, Any]:
    """The arguments of torch's Adam or AdamW."""
    options = as_keywords(own, *OF_EVERY_OUTER_OPTIMIZER)
    return options | {"betas": (options.pop("beta1"), options.pop("beta2"))}
