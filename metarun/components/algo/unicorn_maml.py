"""UNICORN-MAML (Ye and Chao 2022): MAML with one head vector, copied to all classes."""

from typing import Literal

from torch import Tensor

from metarun.components.algo.adapting import Encode, Support
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.maml import MamlConfig
from metarun.components.algo.new_heads import with_new_head
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.unroll import Meta


@settings
class UnicornMamlConfig(MamlConfig):
    """UNICORN-MAML (Ye and Chao 2022): MAML with one head vector, copied to all classes."""

    order: Literal[1, 2] = 1  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    inner_steps: int = 5  # inner steps in training
    eval_inner_steps: int = 5  # inner steps in validation and test
    temperature: float = 1.0  # divides the scores of queries; 0.5 in the reference code

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("algo.temperature", self.temperature)


@builds(UnicornMamlConfig)
def unicorn_maml(problem: Problem, own: UnicornMamlConfig) -> Algorithm:
    """Learn features, from a head whose classes all start with one vector w.

    MAML's initial head has an order of classes, and the order of a task's classes changes what is
    learned by points. Here w_k = w and b_k = b for all classes k, so it does not matter, and tasks
    may have any number of classes.

    What all classes have in common drops out of a softmax, in inner steps as in predictions: w and
    b change no probability, and their gradient is zero, in the reference code too, which keeps them
    at the random values that it begins with. So they are zero here, and not learned. The first
    inner step then moves the head alone.

    The reference code is of first order, with 5 (1-shot) or 20 (5-shot) steps of 0.1 from a
    pretrained network.

    Raises:
        ValueError: see `with_new_head`.
    """

    def head(meta: Meta, support: Support, features: Encode, width: int) -> tuple[Tensor, Tensor]:
        assert support.way is not None
        like = next(problem.model.parameters())
        return like.new_zeros(support.way, width), like.new_zeros(support.way)

    return with_new_head(problem, own, "unicorn_maml", head, 1 / own.temperature)
