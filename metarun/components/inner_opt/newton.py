"""Newton's method with a trust radius, for the parameters of a head."""

from metarun.components.inner_opt.base import OF_EVERY_INNER_OPTIMIZER, InnerOptConfig
from metarun.config.checks import at_least, positive
from metarun.config.component import as_keywords, builds, settings
from metarun.unroll import LossOptimizer, optim


@settings
class NewtonConfig(InnerOptConfig):
    """Newton's method, for the parameters of a head."""

    trust_radius: float | None = 1.0  # length of the longest step; null: no bound
    damping: float = 0.0  # added to the curvature; for a head alone 0.01 may replace the radius
    joint: bool = True  # all parameters are one variable; false: each row by itself

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("inner_opt.trust_radius", self.trust_radius)
        at_least("inner_opt.damping", self.damping, 0)


@builds(NewtonConfig)
def newton(own: NewtonConfig) -> LossOptimizer:
    """The differentiable optimizer: `metarun.unroll.newton`."""
    return optim.newton(**as_keywords(own, *OF_EVERY_INNER_OPTIMIZER))
