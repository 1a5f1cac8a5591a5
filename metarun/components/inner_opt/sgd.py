"""Stochastic gradient descent, with momentum (Sutskever et al. 2013) if that is wanted."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import between
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class SgdConfig(InnerGradientConfig):
    """Stochastic gradient descent."""

    lr: float = 0.4  # learning rate of the inner loop
    momentum: float = 0.0  # share of the previous step that is kept
    dampening: float = 0.0  # share of a new gradient that the momentum leaves out
    nesterov: bool = False  # Nesterov momentum
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inner_opt.dampening", self.dampening, 0, 1)


@builds(SgdConfig)
def sgd(own: SgdConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.sgd`."""
    return clipped(optim.sgd, own)
