"""UNICORN-MAML (Ye and Chao 2022): MAML with one head vector, copied to all classes."""

from typing import Literal

from torch import Tensor, nn

from metarun.components.algo.adapting import Encode, Support
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.maml import MamlConfig
from metarun.components.algo.new_heads import with_new_head
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.unroll import Meta

WEIGHT, BIAS = "shared_head.weight", "shared_head.bias"


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
    """Learn features and one vector w from which the head of every class starts.

    MAML's initial head has an order of classes, and the order of a task's classes changes what is
    learned by points. Here w_k = w and b_k = b for all classes k, so it
    does not matter, and tasks may have any number of classes. The gradient of w is the sum of
    those of all w_k.

    What all classes have in common drops out of a softmax, in inner steps as in predictions. So w
    and b change no probability and have no gradient beyond rounding, here as in the reference
    code: the method is MAML with a head that starts at zero. (An inner optimizer whose steps grow
    with the parameters, adafactor, is an exception.) The first inner step moves the head alone.

    The reference code is of first order, with 5 (1-shot) or 20 (5-shot) steps of 0.1 from a
    pretrained network.

    Raises:
        ValueError: see `with_new_head`.
    """
    weights, embed = embedding(problem.model, "unicorn_maml")
    like = next(iter(weights.values()))
    one = nn.Linear(width_of(problem, embed, weights), 1)
    initial = {WEIGHT: one.weight.detach().to(like), BIAS: one.bias.detach().to(like)}

    def head(meta: Meta, support: Support, features: Encode) -> tuple[Tensor, Tensor]:
        assert support.way is not None
        return meta[WEIGHT].expand(support.way, -1), meta[BIAS].expand(support.way)

    return with_new_head(problem, own, "unicorn_maml", head, initial, 1 / own.temperature)
