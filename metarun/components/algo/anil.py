"""Almost No Inner Loop (Raghu, Raghu, Bengio and Vinyals 2020): adapt the head only."""

from collections.abc import Sequence
from typing import Any

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.maml import maml


def anil(problem: Problem, *, adapt: Sequence[str] = ("head.*",), **settings: Any) -> Algorithm:
    """MAML with an inner loop over the parameters that match `adapt`: the head's.

    The body is meta-learned from the query loss and shared by all tasks. Of a backbone that has
    `features` and `head`, the features of a task are computed once, whatever the inner steps.
    """
    return maml(problem, adapt=adapt, **settings)
