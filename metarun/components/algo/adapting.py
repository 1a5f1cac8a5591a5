"""From `adapt(meta, support) -> predictor` to the loss, the score and the curve of a task.

The core of every method is: from a support set, make something that labels queries. What follows
from that is here, once: the query loss of training, and the trace of an evaluation.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.components.algo.base import (
    Algorithm,
    Episode,
    Problem,
    Steps,
    Trace,
    evaluating,
)
from metarun.components.algo.normalising import Normalising
from metarun.components.algo.padding import Known, known, without_absent
from metarun.components.backbone.norm import Seen, collecting
from metarun.components.contract import check_predictions
from metarun.components.precision import computing_in, within
from metarun.unroll import Meta

Predictor = Callable[[Any], Tensor]
"""From encoded examples to the outputs of the objective: scores of classes, or targets."""

Watch = Callable[[Predictor], Any]
"""Called with the predictor from before the first inner step, and with that after each."""

Encode = Callable[[Meta, Tensor], Any]
"""`encode(meta, x)`: what of examples does not change by adaptation, so it is computed once."""


Weigh = Callable[[Tensor], Tensor]
"""`weigh(meta-steps done) -> weights (inner steps,)`, which add up to 1."""

OuterLoss = Callable[[Meta, Any], tuple[Tensor, dict[str, Any]]]
"""`loss(meta, task) -> (outer loss, extra)`, as in `Algorithm`."""


class Support(NamedTuple):
    """What is known of a task; or, for an outer loss, its queries.

    Attributes:
        x: the encoded support examples.
        y: their labels (examples,), or targets (examples, outputs).
        way: how many classes there are; None in a regression.
        queries: the encoded queries, without their labels, for a method that says
            `transductive=True`; else None. It adapts to them all together, so what it predicts
            for one depends on the others, and its results say so. Its predictor gets them again.
        known: bool (examples,), which of them belong to an uneven task, and do not pad it; None:
            all, as where an algorithm does not say `uneven=True`.
    """

    x: Any
    y: Tensor
    way: int | None
    queries: Any = None
    known: Tensor | None = None


class Adapted(NamedTuple):
    """What came of a support set.

    Attributes:
        predict: the predictor.
        inner_losses: the inner loss before each inner step, (inner steps,).
        watched: what `watch` gave, (inner steps + 1) items; empty without it.
    """

    predict: Predictor
    inner_losses: Tensor
    watched: list[Any]


Adapt = Callable[[Meta, Support, int, Watch | None], Adapted]
"""`adapt(meta, support, inner steps, watch)`."""

Outer = Callable[[Meta, Support, Support, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""`outer(meta, support, queries, outputs) -> (outer loss, metrics)`; `outputs` of the queries."""


def by_steps(
    problem: Problem,
    init: Callable[[], dict[str, Tensor]],
    adapt: Adapt,
    steps: Steps,
    *,
    encode: Encode = lambda meta, x: x,
    adapted: tuple[str, ...] | None = None,
    loss: OuterLoss | None = None,
    weigh: Weigh | None = None,
    kept: tuple[str, ...] = (),
    batch_size: int | None = None,
    differentiates: bool = True,
    transductive: bool = False,
    averages: bool = False,
    uneven: bool = False,
) -> Algorithm:
    """The algorithm that takes inner steps on the support set.

    Args:
        problem: what it is built for.
        init: the initial meta-parameters, by name.
        adapt: `adapt(meta, support, inner steps, watch) -> Adapted`, a pure function.
        steps: inner steps.
        encode: applied to the examples before `adapt`, and before its predictor.
        adapted: names of the parameters that the inner steps change; None: not stated.
        loss: an outer loss of its own; None: the query loss.
        weigh: how much the query loss after each inner step counts; None: the last one alone.
        kept, batch_size, differentiates, transductive, uneven: see `Algorithm`.
        averages: whether `loss` gives the next moving averages of `backbone.norm=running`.

    Raises:
        ValueError: inner hyperparameters are to be learned, and nothing is differentiated; or
            `backbone.norm=running` with an outer loss of its own.
    """
    inner = problem.inner
    if not differentiates and (inner.learn or inner.groups or inner.precondition):
        raise ValueError(
            "the algorithm differentiates nothing through its inner steps, and has no groups: "
            "leave inner_opt.learn and inner_opt.groups empty, and inner_opt.precondition out"
        )
    made = _algorithm(problem, init, adapt, steps, encode, weigh=weigh, transductive=transductive)
    if loss is not None:
        if made.kept and not averages:
            raise ValueError(
                "backbone.norm=running needs an algorithm that learns by a query loss, or from "
                "plain batches, as this one does not: choose transductive, support or "
                "support_plus_one"
            )
        made = made._replace(loss=loss)
    return made._replace(
        steps=steps,
        adapted=adapted,
        kept=(*made.kept, *kept),
        batch_size=batch_size,
        differentiates=differentiates,
        uneven=uneven,
    )


def at_once(
    problem: Problem,
    init: Callable[[], dict[str, Tensor]],
    adapt: Callable[[Meta, Support], Predictor],
    *,
    encode: Encode = lambda meta, x: x,
    outer: Outer | None = None,
    uneven: bool = False,
) -> Algorithm:
    """The algorithm without inner steps: metric methods, heads in closed form.

    Where classes are told apart by their examples alone, as here, tasks may have any number of
    them, another in evaluation than in training.

    Args:
        problem: what it is built for; it must be a classification for metric methods.
        init: the initial meta-parameters, by name.
        adapt: `adapt(meta, support) -> predictor`, a pure function.
        encode: applied to the examples before `adapt`, and before its predictor.
        outer: an outer loss of its own, and metrics to be logged; None: the query loss.
        uneven: see `Algorithm`.
    """

    def adapt_at_once(meta: Meta, support: Support, steps: int, watch: Watch | None) -> Adapted:
        predict = adapt(meta, support)
        like = next(iter(meta.values()), support.y)  # what learns nothing may have none
        none = like.new_empty(0)
        return Adapted(predict, none, [] if watch is None else [watch(predict)])

    made = _algorithm(problem, init, adapt_at_once, Steps(0, 0), encode, outer=outer)
    # Before the head, a network of features that were computed before has no parameters at all.
    has_body = any(not name.startswith("head.") for name, _ in problem.model.named_parameters())
    learns = has_body or bool(made.init())
    return made._replace(
        has_inner_loop=False, differentiates=False, any_way=True, learns=learns, uneven=uneven
    )


def one_hot(support: Support) -> Tensor:
    """The labels as rows of 0 and 1, (examples, way), of the examples' type; padding has zeros."""
    assert support.way is not None
    classes = torch.arange(support.way, device=support.y.device)
    return (support.y[:, None] == classes).to(support.x.dtype)


def _algorithm(
    problem: Problem,
    init: Callable[[], dict[str, Tensor]],
    adapt: Adapt,
    steps: Steps,
    encode: Encode,
    *,
    weigh: Weigh | None = None,
    outer: Outer | None = None,
    transductive: bool = False,
) -> Algorithm:
    objective, ways, precision = problem.objective, problem.ways, problem.precision
    adapt = within(precision.inner, adapt)
    way = (None, None) if ways is None else ways
    normalising = Normalising(problem.norm, problem.model)
    encode_support = within(precision.inner, normalising.support)

    def starts() -> dict[str, Tensor]:
        return init() | normalising.init()

    def known_of(episode: Episode) -> Known:
        if not problem.uneven:
            return Known()
        return Known(known(episode.support_y), known(episode.query_y))

    def queries_of(meta: Meta, episode: Episode, seen: Seen, evaluates: bool) -> Any:
        of, beside, own = episode.query_x, episode.support_x, known_of(episode)
        return normalising.queries(encode, meta, of, beside, seen, evaluates, own)

    def shown(
        predict: Predictor, meta: Meta, queries: Any, support: Support, evaluates: bool, own: Known
    ) -> Tensor:
        """The outputs for queries, of the classes that the task has."""
        with computing_in(precision.outer):  # also where it is called after each inner step
            outputs = normalising.outputs(predict, meta, queries, support.x, evaluates, own)
        return without_absent(outputs, support.y) if problem.uneven else outputs

    def loss(
        meta: Meta, episode: Episode, step: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        own = known_of(episode)
        watched = collecting() if normalising.kept else nullcontext(Seen())
        with watched as averaged:
            encoded, seen = encode_support(encode, meta, episode.support_x, False, own)
        support = Support(encoded, episode.support_y, way[0], known=own.support)
        if transductive:
            support = support._replace(queries=queries_of(meta, episode, seen, False))
        if weigh is not None:
            return weighted(meta, episode, support, seen, step)
        adapted = adapt(meta, support, steps.training, None)
        again = collecting() if normalising.kept else nullcontext(Seen())
        with again as also:
            queries = queries_of(meta, episode, seen, False)
            outputs = shown(adapted.predict, meta, queries, support, False, own)
        check_predictions(outputs, len(episode.query_y))
        query_loss = objective.loss(outputs, episode.query_y)
        extra: dict[str, Any] = {
            "loss": query_loss,
            "score": objective.score(outputs, episode.query_y),
            "inner_losses": adapted.inner_losses,
        }
        if normalising.kept:
            extra["kept"] = normalising.updated(meta, averaged.with_those_of(also))
        if outer is None:
            return query_loss, extra
        asked = support._replace(x=queries, y=episode.query_y)
        value, metrics = outer(meta, support, asked, outputs)
        return value, extra | {"metrics": metrics}

    def weighted(
        meta: Meta, episode: Episode, support: Support, seen: Seen, step: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss over all inner steps; what is reported is that after the last one."""
        assert weigh is not None
        own, queries = known_of(episode), queries_of(meta, episode, seen, False)

        def watch(predict: Predictor) -> tuple[Tensor, Tensor]:
            outputs = shown(predict, meta, queries, support, False, own)
            check_predictions(outputs, len(episode.query_y))
            targets = episode.query_y
            return objective.loss(outputs, targets), objective.score(outputs, targets)

        adapted = adapt(meta, support, steps.training, watch)
        losses = torch.stack([one for one, _ in adapted.watched[1:]])
        now = losses.new_zeros((), dtype=torch.float64) if step is None else step
        outer = (weigh(now).to(losses) * losses).sum()
        extra = {
            "loss": losses[-1],
            "score": adapted.watched[-1][1],
            "inner_losses": adapted.inner_losses,
            "metrics": {"weighted_loss": outer},
        }
        return outer, extra

    def evaluated(meta: Meta, episode: Episode, look: Callable[[Tensor], Any]) -> list[Any]:
        """What `look` makes of the outputs for the queries, before and after each inner step."""
        own = known_of(episode)
        with evaluating(problem.model):
            encoded, seen = encode_support(encode, meta, episode.support_x, True, own)
            queries = queries_of(meta, episode, seen, True)

            def watch(predict: Predictor) -> Any:
                return look(shown(predict, meta, queries, support, True, own))

            given = queries if transductive else None
            support = Support(encoded, episode.support_y, way[1], given, own.support)
            watched: list[Any] = adapt(meta, support, steps.evaluation, watch).watched
            return watched

    def trace(meta: Meta, episode: Episode) -> Trace:
        def scored(outputs: Tensor) -> tuple[Tensor, Tensor]:
            targets = episode.query_y
            return objective.loss(outputs, targets), objective.score(outputs, targets)

        losses, scores = zip(*evaluated(meta, episode, scored), strict=True)
        return Trace(torch.stack(losses), torch.stack(scores))

    def outputs_of(meta: Meta, episode: Episode) -> Tensor:
        return torch.stack(evaluated(meta, episode, lambda outputs: outputs))

    def predictor(meta: Meta, x: Tensor, y: Tensor, ways: int | None) -> Predictor:
        own = Known(known(y)) if problem.uneven else Known()
        with evaluating(problem.model):
            encoded, seen = encode_support(encode, meta, x, True, own)
            support = Support(encoded, y, ways, known=own.support)
            adapted = None if transductive else adapt(meta, support, steps.evaluation, None)

        def of_examples(given: Tensor) -> Tensor:
            with evaluating(problem.model):
                queries = normalising.queries(encode, meta, given, x, seen, True, own)
                now = adapted
                if now is None:  # each batch of examples is a set of queries to adapt to
                    together = support._replace(queries=queries)
                    now = adapt(meta, together, steps.evaluation, None)
                return shown(now.predict, meta, queries, support, True, own)

        return of_examples

    if transductive and problem.norm != "transductive":
        raise ValueError(
            f"backbone.norm={problem.norm}: the algorithm adapts to the queries together, and so "
            "they are normalised together; choose backbone.norm=transductive"
        )
    if weigh is not None and normalising.kept:
        raise ValueError(
            "backbone.norm=running with a loss over all inner steps: which step's moments would "
            "count is not settled; choose another norm, or leave algo.multi_step_loss out"
        )
    return Algorithm(
        starts,
        loss,
        trace,
        kept=normalising.kept,
        follows_step=weigh is not None,
        transductive=transductive,
        outputs=outputs_of,
        adapt=predictor,
    )
