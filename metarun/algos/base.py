"""What an algorithm is, and what it works on."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.unroll import (
    GradientMode,
    Granularity,
    Groups,
    InnerOptimizer,
    LossOptimizer,
    Meta,
    Record,
    unrecorded,
)

Episode = Any
"""One task: `support_x`, `support_y`, `query_x`, `query_y`, as in `metarun.data.episodes`."""


HYPER_PREFIX = "inner_opt."
"""Keeps learned hyperparameters apart from weights among the meta-parameters."""


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
    """Fraction of examples whose highest score is that of their label; float64 scalar."""
    return (scores.argmax(dim=-1) == labels).double().mean()


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over all elements. Not `F.mse_loss`, which has no forward-mode derivative."""
    return (outputs - targets).pow(2).mean()


OBJECTIVES = {
    "classification": Objective(F.cross_entropy, accuracy, "accuracy", higher_is_better=True),
    "regression": Objective(mean_squared_error, mean_squared_error, "mse", higher_is_better=False),
}


class InnerLoop(NamedTuple):
    """The inner optimizer and what of it is learned (see `metarun.unroll.hyper`)."""

    optimizer: InnerOptimizer | LossOptimizer
    learn: tuple[str, ...]
    granularity: Granularity
    groups: Groups
    gradient: GradientMode = "reverse"  # how the unroll is differentiated in second order
    record: Record = unrecorded  # applied to what is computed at each inner step


class Problem(NamedTuple):
    """What an algorithm is built for. `model` is only ever called functionally."""

    model: nn.Module
    objective: Objective
    inner: InnerLoop
    outputs: int  # size of the model's output: the way of a classification


class Trace(NamedTuple):
    """How adaptation to one task went: each (inner steps + 1,), from before the first step."""

    query_loss: Tensor
    query_score: Tensor


class Algorithm(NamedTuple):
    """Pure functions of the meta-parameters and of one episode.

    Attributes:
        init: the initial meta-parameters, by name.
        loss: `loss(meta, episode) -> (outer loss, extra)`, for training; `extra` holds
            "loss", "score" and "inner_losses" (inner steps,).
        trace: `trace(meta, episode) -> Trace`, for evaluation.
    """

    init: Callable[[], dict[str, Tensor]]
    loss: Callable[[Meta, Episode], tuple[Tensor, dict[str, Tensor]]]
    trace: Callable[[Meta, Episode], Trace]


def detached_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: without dropout, so that a figure can be repeated."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def apply_model(model: nn.Module, params: Meta, x: Tensor) -> Tensor:
    """The model's output with `params` in place of its own."""
    outputs: Tensor = torch.func.functional_call(model, dict(params), (x,))
    return outputs


class _Features(nn.Module):
    """The part of a backbone before its head, as a module that can be called functionally."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.features(x)  # type: ignore[operator]
        return features


class Halves(NamedTuple):
    """A model cut where adaptation begins.

    Attributes:
        encode: `encode(meta, x)`, what does not change during adaptation; computed once.
        decode: `decode(params, encoded)`, the model's output.
        shared: names of the parameters that `decode` needs besides the adapted ones.
    """

    encode: Callable[[Meta, Tensor], Tensor]
    decode: Callable[[Meta, Tensor], Tensor]
    shared: tuple[str, ...]


def halves(model: nn.Module, adapted: Collection[str]) -> Halves:
    """Cut a model with `features(x)` before its `head` if only the head is adapted.

    Other models are whole: nothing is encoded.
    """
    names = [name for name, _ in model.named_parameters()]
    head = [name for name in names if name.startswith("head.")]
    if not (set(adapted) <= set(head) and hasattr(model, "features") and hasattr(model, "head")):
        shared = tuple(name for name in names if name not in adapted)
        return Halves(lambda meta, x: x, partial(apply_model, model), shared)
    body, features = [name for name in names if name not in head], _Features(model)

    def encode(meta: Meta, x: Tensor) -> Tensor:
        return apply_model(features, {f"model.{name}": meta[name] for name in body}, x)

    def decode(params: Meta, encoded: Tensor) -> Tensor:
        own = {name.removeprefix("head."): value for name, value in params.items()}
        return apply_model(model.get_submodule("head"), own, encoded)

    return Halves(encode, decode, tuple(name for name in head if name not in adapted))
