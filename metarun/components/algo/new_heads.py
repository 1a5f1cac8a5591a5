"""Inner loops over a network whose head is made anew for each task, of any number of classes."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.adapting import Encode, Support
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.comparing import refuse_regression
from metarun.components.algo.descent import Fast, descend
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.maml import MamlConfig
from metarun.components.algo.padding import refuse_rows_together
from metarun.unroll import Meta, Params, match_names

WEIGHT, BIAS = "head.weight", "head.bias"

NewHead = Callable[[Meta, Support, Encode, int], tuple[Tensor, Tensor]]
"""`head(meta, support, features, width)` gives a weight (way, width) and a bias (way,)."""


def with_new_head(
    problem: Problem,
    own: MamlConfig,
    algo: str,
    head: NewHead,
    scale: float = 1.0,
) -> Algorithm:
    """The algorithm that adapts features, and a linear head that starts as `head` says.

    Args:
        problem: a classification; of the model, the features.
        own: the settings.
        algo: the algorithm's name, for messages.
        head: makes the head of a task.
        scale: factor of the scores of queries.

    Raises:
        ValueError: a regression, a model without features, a pattern that matches nothing, a head
            that is not adapted, a preconditioner, whose factors have the shape of a head, or
            uneven tasks with an inner optimizer that moves the rows of a head together.
    """
    refuse_regression(problem, algo)
    assert problem.ways is not None
    if problem.inner.precondition is not None:
        raise ValueError(
            f"inner_opt.precondition: algo={algo} has a head of as many classes as a task, and "
            "factors would be of one number of them; leave it out"
        )
    weights, embed = embedding(problem.model, algo)
    names = [*weights, WEIGHT, BIAS]
    per_step = match_names(weights, own.per_step) if own.per_step else []
    adapted = [name for name in match_names(names, own.adapt) if name not in per_step]
    if WEIGHT not in adapted or BIAS not in adapted:
        raise ValueError(
            f"algo.adapt={own.adapt}: algo={algo} begins each task with a new head, which must be "
            "adapted; add 'head.*'"
        )
    like = next(problem.model.parameters())
    width = width_of(problem, embed, weights)
    shapes = {
        WEIGHT: like.new_zeros(problem.ways[0], width),
        BIAS: like.new_zeros(problem.ways[0]),
    }
    body = {name: weights[name] for name in adapted if name in weights}
    refuse_rows_together(problem, algo, shapes, body)

    def start(meta: Meta, support: Support) -> Params:
        first = {name: meta[name][0] for name in per_step}
        weight, bias = head(meta, support, lambda now, x: embed({**now, **first}, x), width)
        begun = {**meta, WEIGHT: weight, BIAS: bias}
        return {name: begun[name] for name in adapted}

    def decode(params: Meta, x: Tensor) -> Tensor:
        return F.linear(embed(params, x), params[WEIGHT], params[BIAS])

    fast = Fast(
        weights,
        like={name: {**weights, **shapes}[name] for name in adapted},
        start=start,
        decode=decode,
        shared=tuple(n for n in weights if n not in adapted and n not in per_step),
        per_step=tuple(per_step),
        scale=scale,
    )
    return descend(problem, own, fast)._replace(any_way=True)
