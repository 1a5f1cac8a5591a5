"""ProtoNet, R2D2 and MetaOptNet in the idiom of each peer: a head in closed form on features.

Batch normalisation takes the moments of a task's support set or of its queries, so the features of
each are computed by themselves.

"plain" is torch alone, in the manner of LibFewShot, which is no package: features of one task after
the other, then the heads of all tasks in batched operations and one backward pass. "vmap" is the
same with `torch.func.vmap` over tasks for the features, whose convolutions are then those of one
large batch. Libraries take a task at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.peers.library import MetaGradient, imported
from bench.problem import Problem
from metarun.episodes.source import Episodes

Head = Callable[[Problem, Tensor, Tensor, Tensor], Tensor]
"""`head(problem, support, labels, queries) -> scores (tasks, queries, way)`.

The support features are (tasks, examples, features), the labels are rows of 0 and 1, (tasks,
examples, way), and the features of queries are (tasks, queries, features).
"""

SCALE = "algo.scale"


def plain(head: Head, problem: Problem) -> MetaGradient:
    """A loop over tasks for the features, and batched heads."""

    def run(tasks: Episodes) -> None:
        support = torch.stack([problem.body(x) for x in tasks.support_x])
        queries = torch.stack([problem.body(x) for x in tasks.query_x])
        _backward(problem, head, tasks, support, queries)

    return run


def vmap(head: Head, problem: Problem) -> MetaGradient:
    """`vmap` over tasks for the features, and batched heads."""
    features = torch.func.vmap(problem.body)

    def run(tasks: Episodes) -> None:
        support, queries = features(tasks.support_x), features(tasks.query_x)
        _backward(problem, head, tasks, support, queries)

    return run


def _backward(
    problem: Problem, head: Head, tasks: Episodes, support: Tensor, queries: Tensor
) -> None:
    labels = torch.nn.functional.one_hot(tasks.support_y).to(support.dtype)
    scores = head(problem, support, labels, queries)
    torch.autograd.backward(problem.loss(scores.flatten(0, 1), tasks.query_y.flatten()))


def nearest_mean(problem: Problem, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """ProtoNet's scores: minus the squared distance to the mean of each class."""
    means = labels.mT @ support / labels.sum(1)[..., None]
    return -(queries[:, :, None] - means[:, None]).square().sum(-1)


def ridge(problem: Problem, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """R2D2's scores, with the system of as many equations as there are support examples."""

    def with_ones(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    x = with_ones(support) / support.shape[1] ** 0.5
    unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    inner = torch.linalg.solve(
        x @ x.mT + problem.algo.ridge * unit, labels / support.shape[1] ** 0.5
    )
    return problem.parameters[SCALE] * (with_ones(queries) @ (x.mT @ inner))


def machine(problem: Problem, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """MetaOptNet's scores: the dual of its code, solved by qpth for all tasks together."""
    solver = imported("qpth.qp").QPFunction(verbose=-1, maxIter=problem.algo.iterations)
    count, examples, way = labels.shape
    unit = partial(torch.eye, dtype=support.dtype, device=support.device)
    gram = torch.einsum("tij,ab->tiajb", support @ support.mT, unit(way))
    gram = gram.reshape(count, examples * way, -1) + unit(examples * way)
    sums = unit(examples).repeat_interleave(way, 1)
    wanted = labels.flatten(1)
    none = support.new_zeros(count, examples)
    found = solver(gram, -wanted, unit(examples * way), problem.algo.cost * wanted, sums, none)
    alpha = found.view(count, examples, way)
    return problem.parameters[SCALE] * (queries @ support.mT @ alpha)


def learn2learn_prototypes(problem: Problem) -> MetaGradient:
    """`PrototypicalClassifier` for each task."""
    classifier = imported("learn2learn").nn.PrototypicalClassifier
    return _task_by_task(problem, lambda support, y: classifier(support=support, labels=y))


def learn2learn_machine(problem: Problem) -> MetaGradient:
    """`SVClassifier` for each task."""
    library, own = imported("learn2learn"), problem.algo
    imported("qpth")

    def fit(support: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        with _default_dtype(support.dtype):  # of what it makes itself
            machine = library.nn.SVClassifier(
                support, y, ways=problem.way, C_reg=own.cost, max_iters=own.iterations
            )
        return lambda queries: problem.parameters[SCALE] * machine(queries)

    return _task_by_task(problem, fit)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _task_by_task(problem: Problem, fit: Callable[[Tensor, Tensor], Any]) -> MetaGradient:
    def run(tasks: Episodes) -> None:
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            classifier = fit(problem.body(support_x), support_y)
            loss = problem.loss(classifier(problem.body(query_x)), query_y)
            torch.autograd.backward(loss / len(tasks.query_y))

    return run


def easyfsl_prototypes(problem: Problem) -> MetaGradient:
    """`PrototypicalNetworks` for each task; its scores are distances, which are squared here."""
    model = imported("easyfsl.methods").PrototypicalNetworks(problem.body)

    def run(tasks: Episodes) -> None:
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            model.process_support_set(support_x, support_y)
            loss = problem.loss(-model(query_x).square(), query_y)
            torch.autograd.backward(loss / len(tasks.query_y))

    return run


PROTONET = {
    "plain": partial(plain, nearest_mean),
    "vmap": partial(vmap, nearest_mean),
    "learn2learn": learn2learn_prototypes,
    "easyfsl": easyfsl_prototypes,
}
R2D2 = {"plain": partial(plain, ridge), "vmap": partial(vmap, ridge)}
METAOPTNET = {
    "plain": partial(plain, machine),
    "vmap": partial(vmap, machine),
    "learn2learn": learn2learn_machine,
}
