"""Body Only update in Inner Loop (Oh, Yoo, Kim and Yun 2021): adapt all but the head."""

from dataclasses import field

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.maml import MamlConfig, maml
from metarun.config.component import builds, settings


@settings
class BoilConfig(MamlConfig):
    """BOIL (Oh et al. 2021): MAML whose inner loop adapts the body only."""

    adapt: list[str] = field(default_factory=lambda: ["body.*"])  # patterns over parameter names


@builds(BoilConfig)
def boil(problem: Problem, own: BoilConfig) -> Algorithm:
    """MAML with an inner loop over the parameters that match `adapt`: the body's.

    The inner rate of the head is 0, so the features of a task move, not the boundaries between its
    classes. The outer loop learns the head with the rest. γ and β of batch normalisation belong to
    the body, and are adapted, as in the paper's code. Test tasks there take 1 inner step, as
    training tasks do.

    Raises:
        ValueError: the backbone has no parameters `body.…`; name those before its head in
            `adapt`.
    """
    return maml(problem, own)
