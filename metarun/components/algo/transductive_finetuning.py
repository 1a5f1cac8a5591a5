"""Transductive fine-tuning (Dhillon, Chaudhari, Ravichandran and Soatto 2020)."""

import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.adapting import Adapted, Predictor, Support, Watch, by_steps
from metarun.components.algo.base import Algorithm, Problem, Steps
from metarun.components.algo.comparing import class_means
from metarun.components.algo.fitting import fitted
from metarun.components.algo.inner_loop import prepared
from metarun.components.algo.pretraining import PretrainingConfig, pretraining
from metarun.config.checks import MOST_STEPS, at_least, between
from metarun.config.component import builds, settings
from metarun.unroll import Meta, Params

WEIGHT, BIAS = "head.weight", "head.bias"


@settings
class TransductiveFinetuningConfig(PretrainingConfig):
    """Transductive fine-tuning (Dhillon et al. 2020): all weights, by support set and queries."""

    eval_inner_steps: int = 50  # by turns on the support set and on the queries: 25 epochs
    entropy: float = 1.0  # weight of the queries' entropy; 0: the support set alone, in every step

    def __post_init__(self) -> None:
        super().__post_init__()
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        at_least("algo.entropy", self.entropy, 0)


@builds(TransductiveFinetuningConfig)
def transductive_finetuning(problem: Problem, own: TransductiveFinetuningConfig) -> Algorithm:
    """Learn to tell all training classes apart, then fine-tune all weights for each task.

    With z₊(x) the logits of the pre-trained classifier behind a ReLU, the logits of a task are
    w·z₊(x)/‖z₊(x)‖ + b (equation 7). A row of w starts as the mean of z₊ over the support examples
    of its class, of length 1, and b at 0 (equation 6). Then the inner optimizer changes all
    weights, by turns for the cross entropy of the support set and for the mean entropy of the
    queries (the terms of equation 8, a step for each, with one optimizer: section 4). The paper
    takes inner_opt=adam inner_opt.lr=5e-5. In its code the images are augmented in this, too, and
    first and last normalised by moving averages; here batches are normalised by their own moments.

    With `entropy=0` it is what the paper calls fine-tuning, 25 steps there, and not transductive;
    with no inner steps at all, its support-based initialisation.

    Args:
        problem: a classification with labelled training images; of the model, the features.
        own: the settings.

    Raises:
        ValueError: there are no labelled images, the model has no features, queries are not
            normalised together, or inner hyperparameters are to be learned, of which nothing is
            differentiated.
    """
    objective = problem.objective
    pretrained = pretraining(problem, "transductive_finetuning")
    assert problem.ways is not None and problem.classes is not None
    like = next(problem.model.parameters())
    shapes = {WEIGHT: (problem.ways[1], problem.classes), BIAS: (problem.ways[1],)}
    of_a_task = pretrained.start | {name: like.new_zeros(s) for name, s in shapes.items()}
    steps = Steps(0, own.eval_inner_steps)
    loop = prepared(problem.inner, of_a_task, steps)

    def positive_logits(params: Params, x: Tensor) -> Tensor:
        logits: Tensor = pretrained.logits(params, x)
        return logits.relu()

    def scores(params: Params, x: Tensor) -> Tensor:
        directions = F.normalize(positive_logits(params, x), dim=1)
        return F.linear(directions, params[WEIGHT], params[BIAS])

    def predictor(fast: Params) -> Predictor:
        return lambda x: scores(fast, x)

    def loss(fast: Params, step: int, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, queries = given
        if own.entropy and step % 2:
            return own.entropy * mean_entropy(scores(fast, queries))
        return objective.loss(scores(fast, x), y)

    def adapt(meta: Meta, support: Support, taken: int, watch: Watch | None) -> Adapted:
        start = {name: meta[name] for name in pretrained.start}
        found = positive_logits(start, support.x)
        means = class_means(support._replace(x=found))
        start |= {WEIGHT: F.normalize(means, dim=1), BIAS: means.new_zeros(len(means))}
        given = (support.x, support.y, support.queries if own.entropy else support.x)
        return fitted(loop, meta, start, loss, given, predictor, taken, watch)

    made = by_steps(
        problem,
        lambda: dict(pretrained.start),
        adapt,
        steps,
        adapted=tuple(pretrained.start),
        loss=pretrained.loss,
        batch_size=own.batch_size,
        differentiates=False,
        transductive=own.entropy > 0,
        averages=True,
    )
    return made._replace(any_way=True)


def mean_entropy(logits: Tensor) -> Tensor:
    """The mean over examples of −Σ p log p, of the softmax of (examples, classes)."""
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(1).mean()
