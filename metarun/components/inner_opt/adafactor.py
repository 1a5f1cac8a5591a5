"""Adafactor (Shazeer and Stern 2018)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, optim


@settings
class AdafactorConfig(InnerGradientConfig):
    """Adafactor: second moments by rows and columns."""

    beta2_decay: float = -0.8  # exponent of the decay of the second moment
    eps1: float | None = None  # lower bound of the root second moment; null: machine epsilon
    eps2: float = 1e-3  # lower bound of a parameter's root mean square
    d: float = 1.0  # root mean square to which updates are clipped
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta2_decay > 0:
            raise ConfigError(f"inner_opt.beta2_decay={self.beta2_decay}: must be 0 or less")
        at_least("inner_opt.eps1", self.eps1 or 0, 0)
        at_least("inner_opt.eps2", self.eps2, 0)
        at_least("inner_opt.d", self.d, 1)


@builds(AdafactorConfig)
def adafactor(own: AdafactorConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.adafactor`."""
    return clipped(optim.adafactor, own)
