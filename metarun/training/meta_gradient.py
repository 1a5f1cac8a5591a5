"""The meta-gradient of a meta-batch: over ranks, and uphill where an algorithm asks for that."""

from typing import Any

import torch
from torch import Tensor

from metarun.system.ranks import Ranks
from metarun.training.metrics import Metrics
from metarun.training.setup import Setup
from metarun.training.state import TrainState
from metarun.unroll import Meta
from metarun.unroll._torch import pytree


def of_meta_batch(
    setup: Setup, state: TrainState, tasks: Any, weight: float
) -> tuple[dict[str, Tensor], Metrics]:
    """The mean gradient of a meta-batch, the next values of what is kept, and its metrics.

    Args:
        tasks: this rank's share of the meta-batch.
        weight: how large a part of the meta-batch that is.
    """

    def at(meta: Meta) -> tuple[dict[str, Tensor], Metrics]:
        grads, metrics = setup.gradient(meta, tasks, state.step)
        setup.network.settle()
        if setup.ranks.count > 1:
            return over_ranks(setup.ranks, weight, grads, metrics)
        return grads, metrics

    radius, network = setup.algorithm.outer_radius, setup.network
    if not radius:
        return at(state.meta)
    buffers = network.buffers() if network.changing else {}
    grads, _ = at(state.meta)
    if network.changing:  # the look uphill is the one that counts
        network.put(buffers)
    return at(uphill(state.meta, grads, setup.algorithm.kept, radius))


def uphill(
    meta: Meta, grads: dict[str, Tensor], kept: tuple[str, ...], radius: float
) -> dict[str, Tensor]:
    """Leaves at a distance from the meta-parameters, along their gradient."""
    learned = {name: grads[name] for name in meta if name not in kept}
    norm = torch.stack([grad.square().sum() for grad in learned.values()]).sum().sqrt()
    far = radius / (norm + 1e-12)
    moved = {n: (meta[n].detach() + far * g).requires_grad_() for n, g in learned.items()}
    return {**meta, **moved}


def over_ranks(
    ranks: Ranks, weight: float, grads: dict[str, Tensor], metrics: Metrics
) -> tuple[dict[str, Tensor], Metrics]:
    """Means over the meta-batch, from the means over this rank's share, in one exchange.

    Args:
        weight: this rank's part of the meta-batch.
    """
    leaves, structure = pytree.tree_flatten((grads, metrics))
    summed = ranks.total(weight * torch.cat([leaf.flatten() for leaf in leaves]))
    parts = torch.split(summed, [leaf.numel() for leaf in leaves])
    means = [part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)]
    found: tuple[dict[str, Tensor], Metrics] = pytree.tree_unflatten(means, structure)
    return found
