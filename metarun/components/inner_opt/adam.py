"""Adam (Kingma and Ba 2015)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class AdamConfig(InnerGradientConfig):
    """Adam, differentiable."""

    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    amsgrad: bool = False  # divide by the largest second moment so far
    maximize: bool = False  # climb instead of descend
    decoupled_weight_decay: bool = False  # true: AdamW

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("inner_opt.eps", self.eps)


@builds(AdamConfig)
def adam(own: AdamConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.adam`."""
    return clipped(optim.adam, own)
