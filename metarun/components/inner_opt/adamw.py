"""Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class AdamWConfig(InnerGradientConfig):
    """Adam with decoupled weight decay."""

    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    weight_decay: float = 0.01  # pulls the parameters towards zero, not by the gradient
    amsgrad: bool = False  # divide by the largest second moment so far
    maximize: bool = False  # climb instead of descend


@builds(AdamWConfig)
def adamw(own: AdamWConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.adamw`."""
    return clipped(optim.adamw, own)
