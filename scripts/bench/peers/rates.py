"""MAML++ and Meta-SGD in the idiom of each peer: inner steps whose learning rates are learned."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.peers.library import MetaGradient, imported
from bench.peers.maml import by_clones
from bench.problem import Problem, without_head
from metarun.episodes.source import Episodes

ONE_EACH_STEP = "inner_opt.lr/"
ONE_EACH_ELEMENT = "inner_opt.rates."
"""Begin the names of the learned rates of MAML++ and of Meta-SGD, before a parameter's name."""


def plain(problem: Problem) -> MetaGradient:
    """torch alone: `functional_call` and `autograd.grad`, one task after the other."""
    weights = _weights(problem)

    def run(tasks: Episodes) -> None:
        counts = weights()
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            fast, outer = dict(problem.adapted.named_parameters()), []
            for step, count in enumerate(counts):
                loss = problem.loss(functional_call(problem.adapted, fast, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {
                    name: value - _rate(problem, name, step) * grad
                    for (name, value), grad in zip(fast.items(), grads, strict=True)
                }
                if count:
                    outputs = functional_call(problem.adapted, fast, (query_x,))
                    outer.append(count * problem.loss(outputs, query_y))
            torch.autograd.backward(sum(outer[1:], outer[0]) / len(tasks.query_y))

    return run


def vmap(problem: Problem) -> MetaGradient:
    """`torch.func` by hand: the gradient of the mean over `vmap` of a task's loss."""
    weights = _weights(problem)
    names = [name for name, _ in problem.adapted.named_parameters()]

    def loss(fast: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(functional_call(problem.adapted, fast, (x,)), y)

    def task_loss(
        values: dict[str, Tensor], counts: Sequence[float], task: tuple[Tensor, ...]
    ) -> Tensor:
        support_x, support_y, query_x, query_y = task
        fast, outer = {name: values[name] for name in names}, []
        for step, count in enumerate(counts):
            grads = torch.func.grad(loss)(fast, support_x, support_y)
            fast = {
                name: value - _rate(problem, name, step, values) * grads[name]
                for name, value in fast.items()
            }
            if count:
                outer.append(count * loss(fast, query_x, query_y))
        return sum(outer[1:], outer[0])

    def run(tasks: Episodes) -> None:
        counts = weights()
        values = {name: leaf.detach() for name, leaf in problem.parameters.items()}

        def meta_loss(values: dict[str, Tensor]) -> Tensor:
            losses: Tensor = torch.func.vmap(
                lambda *task: task_loss(values, counts, task), in_dims=0
            )(*tasks)
            return losses.mean()

        for name, grad in torch.func.grad(meta_loss)(values).items():
            problem.parameters[name].grad = grad

    return run


def learn2learn_steps(problem: Problem) -> MetaGradient:
    """A clone of the network for each task, updated by rates that the caller keeps."""
    library = imported("learn2learn")
    weights = _weights(problem)
    names = [name for name, _ in problem.adapted.named_parameters()]

    def run(tasks: Episodes) -> None:
        counts = weights()
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            learner, outer = library.clone_module(problem.adapted), []
            for step, count in enumerate(counts):
                loss = problem.loss(learner(support_x), support_y)
                grads = torch.autograd.grad(loss, list(learner.parameters()), create_graph=True)
                steps = [
                    -_rate(problem, name, step) * grad
                    for name, grad in zip(names, grads, strict=True)
                ]
                library.update_module(learner, updates=steps)
                if count:
                    outer.append(count * problem.loss(learner(query_x), query_y))
            torch.autograd.backward(sum(outer[1:], outer[0]) / len(tasks.query_y))

    return run


def learn2learn_meta_sgd(problem: Problem) -> MetaGradient:
    """`MetaSGD(...)`, cloned and adapted for each task."""
    library = imported("learn2learn")
    names = [name for name, _ in problem.adapted.named_parameters()]
    own = nn.ParameterList([problem.parameters[ONE_EACH_ELEMENT + name] for name in names])
    return by_clones(problem, library.algorithms.MetaSGD(problem.adapted, lrs=own))


def parallel_metalearn(problem: Problem) -> MetaGradient:
    """`MAML(…, multi_step_loss=True)` with a rate for each tensor and step; vmap over tasks."""
    wrapper, losses = imported("metalearn.model_wrappers"), imported("metalearn.loss")
    optimizers = imported("metalearn.inner_optimizers")
    body, head = without_head(problem.adapted), problem.adapted.get_submodule("head")
    network = wrapper.MAML_Model(_Flagged(body), _Flagged(head))
    inner = optimizers.InnerSGD(
        OrderedDict(network.get_fast_weights()),
        max_inner_steps=problem.steps,
        per_layer=True,
        per_step=True,
    )
    for name, _ in problem.adapted.named_parameters():
        part = "head.module" if name.startswith("head.") else "backbone.module"
        theirs = f"{part}.{name.removeprefix('head.')}".replace(".", "_")
        inner.lrs[f"lr_{theirs}"] = problem.parameters[ONE_EACH_STEP + name]
    learner = imported("metalearn.algorithms").MAML(
        model=network,
        optimizer=_NoOptimizer(),
        inner_optimizer=inner,
        support_loss_fn=losses.CrossEntropy(losses.CategoricalAccuracy()),
        inner_steps=problem.steps,
        multi_step_loss=True,
        device=next(problem.adapted.parameters()).device,
    )
    weights = _weights(problem)
    learner._init_step_weights = lambda *args, **kwargs: None

    def run(tasks: Episodes) -> None:
        # Version 0.5.6 divides each loss by its weight, so it gets their reciprocals.
        learner.step_weights = [1 / count for count in weights()]
        labels = ({"labels": tasks.support_y}, {"labels": tasks.query_y})
        learner.step(iter([(tasks.support_x, labels[0], tasks.query_x, labels[1])]))

    return run


class _Flagged(nn.Module):
    """A module that ignores the flags which parallel-metalearn calls every module with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, **flags: Any) -> Tensor:
        out: Tensor = self.module(x)
        return out


class _NoOptimizer:
    """In the place of the outer optimizer, whose step is taken by whoever asked for gradients."""

    def add_param_group(self, group: Any) -> None:
        pass

    def zero_grad(self) -> None:
        pass

    def step(self) -> None:
        pass


def _rate(
    problem: Problem, name: str, step: int, values: dict[str, Tensor] | None = None
) -> Tensor:
    """The rate of a parameter in an inner step: (), or of the parameter's shape."""
    known: Any = problem.parameters if values is None else values
    element = ONE_EACH_ELEMENT + name
    return known[element] if element in known else known[ONE_EACH_STEP + name][step]


def _weights(problem: Problem) -> Callable[[], list[float]]:
    """How much the query loss after each inner step counts in this meta-step, then the next one.

    Of MAML++ (Antoniou et al. 2019, section 4, with the constants of their code); all of it is that
    of the last step elsewhere.
    """
    turns, steps, until = itertools.count(), problem.steps, problem.algo.multi_step_loss

    def of_this_turn() -> list[float]:
        turn = next(turns)
        earlier = max((1 - turn / until) / steps, 0.03 / steps) if turn < until else 0.0
        return [*[earlier] * (steps - 1), 1 - (steps - 1) * earlier]

    return of_this_turn


MAML_PP = {
    "plain": plain,
    "vmap": vmap,
    "learn2learn": learn2learn_steps,
    "parallel-metalearn": parallel_metalearn,
}
META_SGD = {"plain": plain, "vmap": vmap, "learn2learn": learn2learn_meta_sgd}
