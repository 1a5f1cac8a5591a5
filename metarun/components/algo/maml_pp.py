"""MAML++ (Antoniou, Edwards and Storkey 2019): MAML with five changes that steady it."""

import logging
from dataclasses import field, replace
from typing import Any, ClassVar

from metarun.components.algo.base import Algorithm, Problem, detached_parameters
from metarun.components.algo.maml import MamlConfig, maml
from metarun.config.component import builds, settings
from metarun.unroll import matches

log = logging.getLogger(__name__)

NORMALISATION = "*.norm.*"


@settings
class MamlPpConfig(MamlConfig):
    """MAML++ (Antoniou et al. 2019): losses, rates, γ and β of each inner step."""

    # A rate of each parameter and inner step, and the cosine of the outer rate.
    usual: ClassVar[dict[str, dict[str, Any]]] = {
        "inner_opt": {"learn": ["lr"], "granularity": "parameter_step"},
        "outer_opt": {"schedule": "cosine", "min_lr": 1e-5},
    }

    inner_steps: int = 5  # inner steps in training
    eval_inner_steps: int = 5  # inner steps in validation and test
    multi_step_loss: int = 5000  # meta-steps in which losses after earlier inner steps count
    per_step: list[str] = field(  # patterns: a value a step, not adapted
        default_factory=lambda: [NORMALISATION]
    )


@builds(MamlPpConfig)
def maml_pp(problem: Problem, own: MamlPpConfig) -> Algorithm:
    """MAML with what the paper adds, each of which is a setting that MAML has as well.

    - Multi-step loss: `multi_step_loss`; 10 of 100 epochs of 500 meta-steps in the
      code for Omniglot, 15 for mini-ImageNet.
    - Derivative-order annealing: `first_order_until`; the paper's 50 epochs are off in all
      configs that the code came with, and here.
    - Per-step γ and β of batch normalisation: `per_step`; where the network has no such layers,
      the default means nothing. The code keeps running moments a step as well, and never
      normalises by them.
    - Learned rates of each parameter tensor and step: `inner_opt.learn` and
      `inner_opt.granularity`. The paper has one a layer; the code has one a tensor.
    - Cosine of the outer rate: `outer_opt.schedule`. The code's mini-ImageNet runs have none.

    The paper's figures are those of an ensemble, the mean logits of the five best checkpoints:
    `trainer.keep_best=5 trainer.ensemble=5` tests that beside the best one. Its inner rate is 0.1
    (Omniglot) or 0.01 (mini-ImageNet): set `inner_opt.lr`.

    Raises:
        ValueError: as `maml`.
    """
    names = detached_parameters(problem.model)
    if own.per_step == [NORMALISATION] and not any(matches(n, NORMALISATION) for n in names):
        log.info("algo=maml_pp: the backbone has no normalisation, so no γ and β a step")
        own = replace(own, per_step=[])
    return maml(problem, own)
