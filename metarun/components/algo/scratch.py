"""Training from scratch on each task: nothing is meta-learned."""

from torch import Tensor

from metarun.components.algo.adapting import Adapted, Predictor, Support, Watch, by_steps
from metarun.components.algo.base import (
    Algorithm,
    Problem,
    Steps,
    apply_model,
    detached_parameters,
)
from metarun.components.algo.fitting import fitted
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.padding import support_outputs
from metarun.config.checks import MOST_STEPS, between
from metarun.config.component import builds, settings
from metarun.unroll import Meta, Params


@settings
class ScratchConfig:
    """Training from scratch on each task: a control, in which nothing is meta-learned."""

    eval_inner_steps: int = 100  # inner steps in validation and test

    def __post_init__(self) -> None:
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)


@builds(ScratchConfig)
def scratch(problem: Problem, own: ScratchConfig) -> Algorithm:
    """Train the network on the support set, from the random weights that the seed gives.

    All tasks start at the same weights. The run has no meta-steps: it shows what the inner
    optimizer does without meta-learning.

    Args:
        problem: a classification or a regression; all parameters of the model are adapted.
        own: the settings.

    Raises:
        ValueError: inner hyperparameters are to be learned, the backbone is to normalise by moving
            averages of training, of which there is none, or all its parameters are frozen.
    """
    model, objective = problem.model, problem.objective
    if problem.norm == "running":
        raise ValueError(
            "backbone.norm=running: algo=scratch has no meta-training whose moments could be "
            "averaged; choose transductive, support or support_plus_one"
        )
    weights, count = detached_parameters(model), Steps(0, own.eval_inner_steps)
    if not weights:
        raise ValueError("algo=scratch: the backbone has frozen all its parameters")
    loop = prepared(problem.inner, weights, count)

    def predictor(fast: Params) -> Predictor:
        return lambda x: apply_model(model, fast, x)

    def inner_loss(fast: Params, step: int, given: tuple[Tensor, Tensor]) -> Tensor:
        x, y = given
        return objective.loss(support_outputs(problem, lambda: apply_model(model, fast, x), y), y)

    def adapt(meta: Meta, support: Support, steps: int, watch: Watch | None) -> Adapted:
        return fitted(
            loop,
            meta,
            {name: meta[name] for name in weights},
            inner_loss,
            (support.x, support.y),
            predictor,
            steps,
            watch,
        )

    made = by_steps(
        problem,
        lambda: dict(weights),
        adapt,
        count,
        adapted=tuple(weights),
        differentiates=False,
        uneven=True,
    )
    return made._replace(learns=False)
