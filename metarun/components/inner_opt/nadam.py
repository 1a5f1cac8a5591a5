"""Adam with Nesterov momentum (Dozat 2016)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class NAdamConfig(InnerGradientConfig):
    """Adam with Nesterov momentum."""

    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    momentum_decay: float = 0.004  # how fast the momentum grows to beta1
    maximize: bool = False  # climb instead of descend
    decoupled_weight_decay: bool = False  # weight decay apart from the gradient, as in AdamW


@builds(NAdamConfig)
def nadam(own: NAdamConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.nadam`."""
    return clipped(optim.nadam, own)
