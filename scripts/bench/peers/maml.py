"""MAML and ANIL in the idiom of each peer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from bench.peers.library import MetaGradient, imported
from bench.problem import Problem
from metarun.episodes.source import Episodes


def vmap(problem: Problem, compiled: bool = False) -> MetaGradient:
    """`torch.func` by hand: the gradient of the mean over `vmap` of a task's loss."""

    def task_loss(params: dict[str, dict[str, Tensor]], task: tuple[Tensor, ...]) -> Tensor:
        support_x, support_y, query_x, query_y = task
        support = functional_call(problem.body, params["body"], (support_x,))
        query = functional_call(problem.body, params["body"], (query_x,))

        def loss(fast: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return problem.loss(functional_call(problem.adapted, fast, (x,)), y)

        fast = params["adapted"]
        for _ in range(problem.steps):
            grads = torch.func.grad(loss)(fast, support, support_y)
            if problem.first_order:
                grads = {name: grad.detach() for name, grad in grads.items()}
            fast = {name: value - problem.lr * grads[name] for name, value in fast.items()}
        return loss(fast, query, query_y)

    def meta_loss(params: dict[str, dict[str, Tensor]], tasks: tuple[Tensor, ...]) -> Tensor:
        losses: Tensor = torch.func.vmap(task_loss, in_dims=(None, 0))(params, tasks)
        return losses.mean()

    gradient: Callable[..., Any] = torch.func.grad(meta_loss)
    if compiled:
        gradient = torch.compile(gradient, fullgraph=True)
    modules = {"adapted": problem.adapted, "body": problem.body}

    def run(tasks: Episodes) -> None:
        parts = {part: dict(module.named_parameters()) for part, module in modules.items()}
        values = {part: {k: p.detach() for k, p in own.items()} for part, own in parts.items()}
        grads = gradient(values, tuple(tasks))
        for part, own in parts.items():
            for name, parameter in own.items():
                parameter.grad = grads[part][name]

    return run


def vmap_compiled(problem: Problem) -> MetaGradient:
    """The same under `torch.compile`."""
    return vmap(problem, compiled=True)


def higher(problem: Problem) -> MetaGradient:
    """`innerloop_ctx` for each task; in first order its gradient at the adapted weights."""
    library = imported("higher")
    inner = torch.optim.SGD(problem.adapted.parameters(), lr=problem.lr)

    def run(tasks: Episodes) -> None:
        for support_x, support_y, query_x, query_y in _each(problem, tasks):
            with library.innerloop_ctx(
                problem.adapted,
                inner,
                copy_initial_weights=False,
                track_higher_grads=not problem.first_order,
            ) as (fast, optimizer):
                for _ in range(problem.steps):
                    optimizer.step(problem.loss(fast(support_x), support_y))
                query = problem.loss(fast(query_x), query_y) / len(tasks.query_y)
                if problem.first_order:  # nothing leads back to the initial weights
                    grads = torch.autograd.grad(query, list(fast.parameters()))
                    for parameter, grad in zip(problem.adapted.parameters(), grads, strict=True):
                        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
                else:
                    torch.autograd.backward(query)

    return run


def learn2learn(problem: Problem) -> MetaGradient:
    """`MAML(...)`, cloned and adapted for each task; around the head alone for ANIL."""
    library = imported("learn2learn")
    return by_clones(
        problem,
        library.algorithms.MAML(problem.adapted, problem.lr, first_order=problem.first_order),
    )


def by_clones(problem: Problem, algorithm: Any) -> MetaGradient:
    """An algorithm of learn2learn's, cloned and adapted for each task."""

    def run(tasks: Episodes) -> None:
        for support_x, support_y, query_x, query_y in _each(problem, tasks):
            learner = algorithm.clone()
            for _ in range(problem.steps):
                learner.adapt(problem.loss(learner(support_x), support_y))
            torch.autograd.backward(problem.loss(learner(query_x), query_y) / len(tasks.query_y))

    return run


def torchopt(problem: Problem) -> MetaGradient:
    """`MetaSGD`, and the initial weights recovered after each task.

    It always builds the graph of second order, so first order takes TorchOpt's functional SGD.
    """
    library = imported("torchopt")
    if problem.first_order:
        return _torchopt_first_order(problem, library)
    inner = library.MetaSGD(problem.adapted, lr=problem.lr)
    weights = library.extract_state_dict(problem.adapted, by="reference", detach_buffers=True)
    state = library.extract_state_dict(inner, by="reference")

    def run(tasks: Episodes) -> None:
        for support_x, support_y, query_x, query_y in _each(problem, tasks):
            for _ in range(problem.steps):
                inner.step(problem.loss(problem.adapted(support_x), support_y))
            torch.autograd.backward(
                problem.loss(problem.adapted(query_x), query_y) / len(tasks.query_y)
            )
            library.recover_state_dict(problem.adapted, weights)
            library.recover_state_dict(inner, state)

    return run


def _torchopt_first_order(problem: Problem, library: Any) -> MetaGradient:
    sgd = library.sgd(lr=problem.lr)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(functional_call(problem.adapted, params, (x,)), y)

    def run(tasks: Episodes) -> None:
        for support_x, support_y, query_x, query_y in _each(problem, tasks):
            fast: dict[str, Tensor] = dict(problem.adapted.named_parameters())
            state = sgd.init(fast)
            for _ in range(problem.steps):
                grads = torch.autograd.grad(loss(fast, support_x, support_y), list(fast.values()))
                found = dict(zip(fast, grads, strict=True))
                updates, state = sgd.update(found, state, inplace=False)
                fast = library.apply_updates(fast, updates, inplace=False)
            torch.autograd.backward(loss(fast, query_x, query_y) / len(tasks.query_y))

    return run


PEERS: dict[str, Callable[[Problem], MetaGradient]] = {
    "vmap": vmap,
    "vmap-compiled": vmap_compiled,
    "higher": higher,
    "learn2learn": learn2learn,
    "torchopt": torchopt,
}


def _each(problem: Problem, tasks: Episodes) -> Iterator[tuple[Tensor, ...]]:
    """One task after the other, images replaced by the body's features."""
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        yield problem.body(support_x), support_y, problem.body(query_x), query_y
