"""Almost No Inner Loop (Raghu, Raghu, Bengio and Vinyals 2020): adapt the head only."""

from dataclasses import field

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.maml import MamlConfig, maml
from metarun.config.component import builds, settings


@settings
class AnilConfig(MamlConfig):
    """ANIL (Raghu et al. 2020): MAML whose inner loop adapts the head only."""

    adapt: list[str] = field(default_factory=lambda: ["head.*"])  # patterns over parameter names


@builds(AnilConfig)
def anil(problem: Problem, own: AnilConfig) -> Algorithm:
    """MAML with an inner loop over the parameters that match `adapt`: the head's.

    The body is meta-learned from the query loss and shared by all tasks. Of a backbone that has
    `features` and `head`, the features of a task are computed once, whatever the inner steps.
    """
    return maml(problem, own)
