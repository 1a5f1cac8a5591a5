"""Adam by the infinity norm (Kingma and Ba 2015, section 7.1)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class AdamaxConfig(InnerGradientConfig):
    """Adam by the infinity norm."""

    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the largest gradient so far
    eps: float = 1e-8  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend


@builds(AdamaxConfig)
def adamax(own: AdamaxConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.adamax`."""
    return clipped(optim.adamax, own)
