"""RMSprop (Hinton 2012, lecture 6e)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class RMSpropConfig(InnerGradientConfig):
    """RMSprop: gradients over the root of their average square."""

    alpha: float = 0.99  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    momentum: float = 0.0  # share of the previous step that is kept
    centered: bool = False  # divide by the standard deviation instead
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_opt.alpha", self.alpha, 0)


@builds(RMSpropConfig)
def rmsprop(own: RMSpropConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.rmsprop`."""
    return clipped(optim.rmsprop, own)
