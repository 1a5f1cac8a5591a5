"""Meta-Curvature (Park and Oliva 2019): MAML that learns a linear map of the inner gradients."""

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.maml import MamlConfig, maml
from metarun.config.component import builds, settings
from metarun.errors import ConfigError


@settings
class MetaCurvatureConfig(MamlConfig):
    """Meta-Curvature (Park and Oliva 2019): MAML that learns a map of the inner gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner_steps:
            raise ConfigError(
                "algo=meta_curvature needs inner steps, or its map is never learned: raise "
                "algo.inner_steps"
            )


@builds(MetaCurvatureConfig)
def meta_curvature(problem: Problem, own: MetaCurvatureConfig) -> Algorithm:
    """MAML with `inner_opt.precondition=meta_curvature`, under a name of its own.

    The gradient of a weight is multiplied by M_o over its outputs, M_i over its inputs and M_f
    over the positions of its filter, which start as identities and are learned
    with the weights. That of a vector is multiplied elementwise. The authors' code for
    mini-ImageNet was never released.

    Raises:
        ValueError: another preconditioner is asked for; the inner optimizer takes more than the
            gradient; implicit gradients.
    """
    inner = problem.inner
    if inner.precondition not in (None, "meta_curvature"):
        raise ValueError(
            f"inner_opt.precondition={inner.precondition}: algo=meta_curvature has its own; leave "
            "it out, or choose algo=maml"
        )
    return maml(problem._replace(inner=inner._replace(precondition="meta_curvature")), own)
