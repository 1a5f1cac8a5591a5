"""Proto-MAML (Triantafillou et al. 2020): MAML whose head starts as the prototypes of a task."""

from typing import Literal

from torch import Tensor

from metarun.components.algo.adapting import Encode, Support
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.comparing import class_means
from metarun.components.algo.maml import MamlConfig
from metarun.components.algo.new_heads import with_new_head
from metarun.config.component import builds, settings
from metarun.unroll import Meta


@settings
class ProtoMamlConfig(MamlConfig):
    """Proto-MAML (Triantafillou et al. 2020): MAML whose head starts as a task's prototypes."""

    order: Literal[1, 2] = 1  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    eval_inner_steps: int = 6  # inner steps in validation and test


@builds(ProtoMamlConfig)
def proto_maml(problem: Problem, own: ProtoMamlConfig) -> Algorithm:
    """Learn features whose prototypes are a good head to take inner steps from.

    Class k begins with the weight 2c_k and the bias −‖c_k‖², with c_k the mean of the features of
    its support examples: the scores are then those of prototypical networks, up to what is common
    to all classes. Inner steps adapt the features and the head. The
    meta-gradient passes through the prototypes, of first order too, as in the reference code.
    Tasks may have any number of classes.

    The reference code takes 1 inner step in training and 6 in evaluation in its best runs on all
    sources, always of first order, and leaves γ and β of batch normalisation out unless told
    otherwise (here `adapt`, such as ['*.conv.*', 'head.*']).

    Raises:
        ValueError: see `with_new_head`.
    """

    def head(meta: Meta, support: Support, features: Encode, width: int) -> tuple[Tensor, Tensor]:
        prototypes = class_means(support._replace(x=features(meta, support.x)))
        return 2 * prototypes, -prototypes.square().sum(1)

    return with_new_head(problem, own, "proto_maml", head)
