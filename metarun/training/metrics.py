"""What is known of a meta-step: its metrics, and how they are kept until they are logged."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.unroll import Meta
from metarun.unroll._torch import pytree


class Metrics(NamedTuple):
    """Means over the tasks of a meta-batch.

    Attributes:
        loss: the outer loss that is reported, ().
        score: the score, ().
        gradient_norm: the Euclidean norm of the whole meta-gradient, ().
        inner_losses: the inner loss before each inner step, (inner steps,).
        own: what the algorithm reports besides, by name, each ().
    """

    loss: Tensor
    score: Tensor
    gradient_norm: Tensor
    inner_losses: Tensor
    own: dict[str, Tensor]


def summarise(grads: Meta, extra: Mapping[str, Any]) -> tuple[Meta, Metrics]:
    """The gradients and the metrics of a meta-batch.

    Beside the gradients stand the next values of what is kept, under its own names.

    Args:
        grads: the meta-gradient by name.
        extra: what the tasks' losses gave beside the loss, stacked by task.
    """
    loss = extra["loss"].mean()
    norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
    metrics = Metrics(
        loss,
        extra["score"].mean().to(loss.dtype),
        torch.linalg.vector_norm(norms),
        extra["inner_losses"].mean(dim=0),
        {name: value.mean() for name, value in extra.get("metrics", {}).items()},
    )
    kept = {name: value.mean(dim=0) for name, value in extra.get("kept", {}).items()}
    return {**grads, **kept}, metrics


def is_finite(metrics: Metrics) -> Tensor:
    """Whether loss, score, norm and inner losses are finite, (); for stacked ones, (meta-steps,).

    What an algorithm reports besides may be NaN where it has no meaning.
    """
    steps = metrics.loss.shape
    flat = [leaf.reshape(*steps, -1) for leaf in metrics[:4]]
    return torch.cat(flat, dim=-1).isfinite().all(dim=-1)


def stacked(recent: Sequence[Metrics]) -> Metrics:
    """Metrics of several meta-steps, each part with a first dimension of them."""
    found: Metrics = pytree.tree_map(lambda *values: torch.stack(values), *recent)
    return found


def are_alike(one: Metrics, other: Metrics) -> bool:
    """Whether two have the same parts, each of the same shape."""
    (ours, form), (theirs, other_form) = map(pytree.tree_flatten, (one, other))
    return bool(form == other_form) and [v.shape for v in ours] == [v.shape for v in theirs]


def to_plain(recent: Sequence[Metrics]) -> dict[str, Any]:
    """Metrics as a checkpoint has them: nothing, or each part stacked, by name."""
    return stacked(recent)._asdict() if recent else {}


def from_plain(parts: Mapping[str, Any], device: torch.device) -> list[Metrics]:
    """Metrics out of a checkpoint whose fields are checked."""
    if not parts:
        return []
    whole = pytree.tree_map(lambda value: value.to(device), Metrics(**parts))
    return [pytree.tree_map(lambda value, i=i: value[i], whole) for i in range(len(whole.loss))]
