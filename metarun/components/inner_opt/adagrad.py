"""Adagrad (Duchi, Hazan and Singer 2011)."""

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import at_least
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class AdagradConfig(InnerGradientConfig):
    """Adagrad: steps shrink with the sum of all squared gradients."""

    lr_decay: float = 0.0  # step t, from 0, has lr / (1 + t · lr_decay)
    initial_accumulator_value: float = 0.0  # where the sum of squared gradients starts
    eps: float = 1e-10  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_opt.initial_accumulator_value", self.initial_accumulator_value, 0)


@builds(AdagradConfig)
def adagrad(own: AdagradConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.adagrad`."""
    return clipped(optim.adagrad, own)
