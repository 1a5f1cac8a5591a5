"""Averaged SGD (Polyak and Juditsky 1992)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, optim


@settings
class ASGDConfig(InnerGradientConfig):
    """Averaged SGD. The average itself is not used, only the decay of the learning rate."""

    lr: float = 0.4
    lambd: float = 1e-4  # decay of the parameters and, with alpha, of the lr
    alpha: float = 0.75  # power of the decay of the lr
    t0: float = 1e6  # step from which on parameters are averaged; the average is not used
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambd", "alpha"):
            at_least(f"inner_opt.{name}", getattr(self, name), 0)
        if "t0" in self.learn:
            raise ConfigError(
                "inner_opt.learn: t0 says from which step on parameters are averaged, and the "
                "average is not used, so its value would never be learned; leave it out"
            )


@builds(ASGDConfig)
def asgd(own: ASGDConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.asgd`."""
    return clipped(optim.asgd, own)
