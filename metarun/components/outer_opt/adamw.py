"""Adam with decoupled weight decay (Loshchilov and Hutter 2019), torch's own."""

from typing import Any

import torch

from metarun.components.outer_opt.adam import OuterAdamConfig, torch_options
from metarun.components.outer_opt.base import IMPLEMENTATION
from metarun.config.component import builds, settings


@settings
class OuterAdamWConfig(OuterAdamConfig):
    """Adam with decoupled weight decay, torch's own."""

    weight_decay: float = 0.01  # not applied to learned inner hyperparameters


@builds(OuterAdamWConfig)
def adamw(params: Any, own: OuterAdamWConfig) -> torch.optim.Optimizer:
    """`torch.optim.AdamW` over parameters, or param groups."""
    return torch.optim.AdamW(params, **torch_options(own), **IMPLEMENTATION)
