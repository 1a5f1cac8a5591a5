"""Adadelta (Zeiler 2012)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import between
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class AdadeltaConfig(InnerGradientConfig):
    """Adadelta: steps as long as the recent ones, by the recent gradients."""

    lr: float = 1.0
    rho: float = 0.9  # decay of the averages of squared gradients and moves
    eps: float = 1e-6  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inner_opt.rho", self.rho, 0, 1)


@builds(AdadeltaConfig)
def adadelta(own: AdadeltaConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.adadelta`."""
    return clipped(optim.adadelta, own)
