"""Meta-SGD (Li, Zhou, Chen and Li 2017): learn a rate of each element of the parameters, too."""

from typing import ClassVar

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.descent import DescentConfig
from metarun.components.algo.maml import MamlConfig, maml
from metarun.config.checks import finite
from metarun.config.component import builds, settings
from metarun.errors import ConfigError


@settings
class MetaSgdConfig(MamlConfig):
    """Meta-SGD (Li et al. 2017): MAML that learns a rate of each element of the parameters."""

    of_training: ClassVar[tuple[str, ...]] = (*DescentConfig.of_training, "rate_low", "rate_high")

    eval_inner_steps: int = 1  # inner steps in validation and test
    rate_low: float = 0.005  # initial rates are drawn uniformly from here on …
    rate_high: float = 0.1  # … to here; what is learned of them may be negative

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("algo.rate_low", self.rate_low)
        finite("algo.rate_high", self.rate_high)
        if self.rate_low > self.rate_high:
            raise ConfigError(
                f"algo.rate_low={self.rate_low}: must not be above algo.rate_high={self.rate_high}"
            )
        if not self.inner_steps:
            raise ConfigError("algo=meta_sgd needs inner steps, or its rates are never learned")


@builds(MetaSgdConfig)
def meta_sgd(problem: Problem, own: MetaSgdConfig) -> Algorithm:
    """Learn initial weights θ and rates α of their shape: θ' = θ − α ∘ ∇L(θ) (equation 2).

    The rates are meta-parameters like θ, and nothing keeps their sign, so that each is a length
    and a direction. The paper takes one inner step. More of them, and other inner optimizers than
    sgd, use the same α in the place of their `lr`. `inner_opt.lr` itself has no effect.

    The paper states no code; rates from U(0.005, 0.1) are those that implementations of others
    begin with.

    Raises:
        ValueError: the inner optimizer has no `lr`, or that is to be learned or grouped as well;
            implicit gradients, which have no derivative by a rate.
    """
    rates = (own.rate_low, own.rate_high)
    return maml(problem._replace(inner=problem.inner._replace(rates=rates)), own)
