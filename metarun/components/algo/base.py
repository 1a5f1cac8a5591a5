"""What an algorithm is, and what it works on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.precision import Precision, computed_in_format
from metarun.episodes.examples import LabelledExamples
from metarun.unroll import (
    GradientMode,
    Granularity,
    Groups,
    InnerOptimizer,
    LossOptimizer,
    Meta,
    Preconditioner,
    Record,
    unrecorded,
)
from metarun.unroll.names import selects

Episode = Any
"""One task: `support_x`, `support_y`, `query_x`, `query_y`, as in `metarun.episodes.source`."""


HYPER_PREFIX = "inner_opt."
"""Keeps learned hyperparameters apart from weights among the meta-parameters."""

OWN_PREFIX = "algo."
"""The same for the scalars that an algorithm learns of its own: a temperature, a regularisation."""

HYPERPARAMETERS = (HYPER_PREFIX, OWN_PREFIX)
"""What names begin with that weight decay leaves alone, and logs have as scalars."""


class Objective(NamedTuple):
    """What is minimised, and what is reported.

    Attributes:
        loss: `loss(outputs, targets)`, a mean over examples.
        score: `score(outputs, targets)`, what results report.
        score_name: "accuracy" or "mse".
        higher_is_better: whether a higher score is a better model.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    score_name: str
    higher_is_better: bool


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """Fraction of examples whose highest score is that of their label; float64 scalar.

    It is NaN where a score is, of which `argmax` would make a class.
    """
    right = (scores.argmax(dim=-1) == labels).double()
    return right.masked_fill(scores.isnan().any(dim=-1), torch.nan).mean()


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all elements. Not `F.mse_loss`, which has no forward-mode derivative."""
    return (outputs - targets).pow(2).mean()


OBJECTIVES = {
    "classification": Objective(F.cross_entropy, accuracy, "accuracy", higher_is_better=True),
    "regression": Objective(mean_squared_error, mean_squared_error, "mse", higher_is_better=False),
}


class InnerSchedule(NamedTuple):
    """How the inner learning rate falls, from its own value to another.

    Attributes:
        kind: "cosine" or "linear".
        min_lr: where it ends.
        steps: inner steps until then; None: as many as training takes.
    """

    kind: str
    min_lr: float
    steps: int | None


class InnerLoop(NamedTuple):
    """The inner optimizer and what of it is learned: see `algo.inner_loop`."""

    optimizer: InnerOptimizer | LossOptimizer
    learn: tuple[str, ...]
    granularity: Granularity
    groups: Groups
    gradient: GradientMode = "reverse"  # how the unroll is differentiated in second order
    record: Record = unrecorded  # applied to what is computed at each inner step
    schedule: InnerSchedule | None = None
    precondition: str | Preconditioner | None = None  # or "meta_curvature", "kronecker" …
    rates: tuple[float, float] | None = None  # each element learns its own, from between these


class Problem(NamedTuple):
    """What an algorithm is built for. `model` is only ever called functionally."""

    model: nn.Module
    objective: Objective
    inner: InnerLoop
    outputs: int  # size of the model's output: the way of a classification
    inputs: Callable[[], Sequence[Tensor]] | None = None  # support and query, to try the model
    ways: tuple[int, int] | None = None  # classes of a task in training and in evaluation
    input_shape: tuple[int, ...] = ()  # of one example
    classes: int | None = None  # of the training data, where there are labelled examples of them
    norm: str = "transductive"  # what normalises queries: `algo.normalising`
    examples: int | None = None  # to train on, where the data are labelled examples and no tasks
    uneven: bool = False  # whether tasks are padded; the objective then leaves the padding out
    precision: Precision = Precision()  # that the model computes in


class Trace(NamedTuple):
    """How adaptation to one task went: each (inner steps + 1,), from before the first step."""

    query_loss: Tensor
    query_score: Tensor


class Steps(NamedTuple):
    """How many inner steps there are."""

    training: int
    evaluation: int


class OneModel(NamedTuple):
    """What an algorithm says that solves no tasks: it trains one classifier on labelled examples.

    The classifier's own parameters are among those of `init`, learned by the outer gradient or
    kept. `Algorithm.trace` then takes a `Batch` of examples, which belong together as those of a
    batch do, and gives a trace of each: its parts have the shape (examples, 1).

    Attributes:
        reads: `reads(examples)` gives what meta-steps learn from, out of `LabelledExamples`. It has
            a method `sample(meta-steps done, 1)`, whose tensors have a first dimension of 1.
        batch_size: examples at a time in an evaluation.
        advance: `advance(meta, what a meta-step learned from)` gives the next values of what is
            kept, with the meta-parameters as the outer optimizer has left them. None: the loss
            gives them, if there are any.
        every: meta-steps from one advance to the next.
    """

    reads: Callable[[LabelledExamples], Any]
    batch_size: int
    advance: Callable[[Meta, Any], dict[str, Tensor]] | None = None
    every: int = 1


class Algorithm(NamedTuple):
    """Pure functions of the meta-parameters and of one episode.

    Attributes:
        init: the initial meta-parameters, by name.
        loss: `loss(meta, episode) -> (outer loss, extra)`, for training; `extra` holds
            "loss", "score" and "inner_losses" (inner steps,). It may hold "metrics", numbers by
            name, whose means are logged as `train/<name>`.
        trace: `trace(meta, episode) -> Trace`, for evaluation.
        steps: inner steps in training and in evaluation; None: not stated.
        adapted: names of the parameters that the inner loop changes; None: not stated.
        kept: names of those of `init` that are not learned by gradient but carried on: the `loss`
            gives their next values in extra["kept"], and the mean over the tasks of a meta-batch
            goes on. With `one_model.advance`, that gives them.
        batch_size: it learns from plain batches of so many labelled examples, each a `Batch`,
            and not from episodes; None: from episodes.
        differentiates: whether derivatives pass through its inner steps.
        has_inner_loop: whether it takes inner steps, with the inner optimizer.
        any_way: whether tasks may have another number of classes than the model has outputs.
        learns: whether it meta-learns. A control does not: its run takes no meta-steps, and the
            meta-parameters stay as `init` gives them, which may be none at all.
        transductive: whether it adapts to the queries, too, which then have to be there together.
        follows_step: whether `loss` takes a third argument: how many meta-steps are done, a float64
            tensor (). It is an input of recordings; a count in Python would stand still in them.
        outer_radius: how far uphill the outer step takes its gradient (SAM); 0: where it stands.
        outputs: `outputs(meta, episode)`, those for the queries that `trace` scores, (inner steps
            + 1, queries, outputs); None: not stated.
        adapt: `adapt(meta, support_x, support_y, way) -> predictor`, from examples to outputs, as
            in evaluation; None: not stated.
        one_model: it trains one classifier, which other examples of the same classes evaluate;
            None: it solves tasks.
        uneven: whether it makes of a padded task what it would make of the task alone.
        uneven_with: the setting with which it would, as it is typed; None: there is none.
    """

    init: Callable[[], dict[str, Tensor]]
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    trace: Callable[[Meta, Episode], Trace]
    steps: Steps | None = None
    adapted: tuple[str, ...] | None = None
    kept: tuple[str, ...] = ()
    batch_size: int | None = None
    differentiates: bool = True
    has_inner_loop: bool = True
    any_way: bool = False
    learns: bool = True
    transductive: bool = False
    follows_step: bool = False
    outer_radius: float = 0.0
    outputs: Callable[[Meta, Episode], Tensor] | None = None
    adapt: Callable[[Meta, Tensor, Tensor, int | None], Callable[[Tensor], Tensor]] | None = None
    one_model: OneModel | None = None
    uneven: bool = False
    uneven_with: str | None = None


def detached_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's learned parameters, by name.

    Those that the model was built with `requires_grad=False` are frozen: they are not among them.
    """
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def refuse_frozen(model: nn.Module, patterns: Iterable[str], setting: str) -> None:
    """Refuse patterns that name frozen parameters and no other.

    Args:
        setting: what the patterns are given by.

    Raises:
        ValueError: names the pattern and what it may name.
    """
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    for pattern in patterns:
        named = [name for name in needed if selects(pattern, name, needed)]
        if named and not any(needed[name] for name in named):
            raise ValueError(
                f"{setting}: {pattern!r} names only parameters that the backbone has frozen by "
                f"requires_grad=False ({', '.join(named)}); not frozen are: "
                f"{', '.join(name for name in needed if needed[name])}"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: without dropout, so that a figure can be repeated."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # a part may have been in evaluation mode all along
            module.training = training


def apply_model(model: nn.Module, params: Meta, x: Tensor) -> Tensor:
    """The model's output with `params` in place of its own, in their format."""

    def call() -> Tensor:
        outputs: Tensor = torch.func.functional_call(model, dict(params), (x,))
        return outputs

    like = next((value.dtype for value in params.values()), x.dtype)
    return computed_in_format(call, x, like)
