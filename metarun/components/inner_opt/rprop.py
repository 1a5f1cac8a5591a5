"""Rprop (Riedmiller and Braun 1993)."""

from metarun.components.inner_opt.base import OF_EVERY_INNER_OPTIMIZER, InnerOptConfig
from metarun.config.checks import BELOW_ONE, at_least, between
from metarun.config.component import as_keywords, builds, settings
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, optim


@settings
class RpropConfig(InnerOptConfig):
    """Rprop: steps by the signs of the gradients, through which no derivative flows."""

    lr: float = 0.01  # the first step size
    eta_minus: float = 0.5  # factor of a step size whose gradient changed its sign
    eta_plus: float = 1.2  # factor of one whose gradient kept it
    step_size_min: float = 1e-6  # smallest step size
    step_size_max: float = 50.0  # largest step size
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_opt.lr", self.lr, 0)
        between("inner_opt.eta_minus", self.eta_minus, 1e-9, BELOW_ONE)
        if not self.eta_plus > 1:
            raise ConfigError(f"inner_opt.eta_plus={self.eta_plus}: must be above 1")


@builds(RpropConfig)
def rprop(own: RpropConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.rprop`."""
    return optim.rprop(**as_keywords(own, *OF_EVERY_INNER_OPTIMIZER))
