"""Rectified Adam (Liu et al. 2020)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class RAdamConfig(InnerGradientConfig):
    """Rectified Adam: with these betas, the first five steps do without a second moment."""

    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend
    decoupled_weight_decay: bool = False  # weight decay apart from the gradient, as in AdamW


@builds(RAdamConfig)
def radam(own: RAdamConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.radam`."""
    return clipped(optim.radam, own)
