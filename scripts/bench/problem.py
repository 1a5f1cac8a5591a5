"""From a case's settings to what the peers work on: the network, the tasks, the outer Adam."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import pixels
from metarun.components.algo.base import OBJECTIVES
from metarun.components.build import build_data, build_model, build_outer_optimizer
from metarun.config.compose import composed
from metarun.config.run import TrainConfig
from metarun.episodes.source import Episodes

BATCHES = 5
"""Meta-batches that peers take in turn; the gradient check takes as many meta-steps."""


class Problem(NamedTuple):
    """One case for a peer.

    Attributes:
        body: what is in front of the adapted part: the identity, but for ANIL.
        adapted: what the inner loop adapts: the whole network, or ANIL's head.
        loss: `loss(outputs, targets)`, a mean over examples.
        lr: of the inner SGD.
        steps: inner steps.
        first_order: whether inner gradients are constants.
        parameters: all of the network by name; a peer leaves the meta-gradient in their `grad`.
        batches: meta-batches of tasks, drawn by metarun's source.
        outer: over `parameters`.
    """

    body: nn.Module
    adapted: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    steps: int
    first_order: bool
    parameters: dict[str, nn.Parameter]
    batches: list[Episodes]
    outer: torch.optim.Optimizer


def config_of(overrides: Sequence[str]) -> TrainConfig:
    """The config of `metarun train` with these settings."""
    pixels.register()
    config: TrainConfig = composed("train", list(overrides))
    return config


def build(config: TrainConfig, device: torch.device) -> Problem:
    """The network with the initial weights that metarun draws from the seed, and the rest."""
    source = build_data(config, device)
    torch.manual_seed(config.seed)
    model = build_model(config, source).to(device)
    anil = config.algo.name == "anil"
    size = config.trainer.meta_batch
    return Problem(
        _without_head(model) if anil else nn.Identity(),
        model.get_submodule("head") if anil else model,
        OBJECTIVES[source.kind].loss,
        config.inner_opt.lr,
        config.algo.inner_steps,
        config.algo.order == 1,
        dict(model.named_parameters()),
        [source.sample("train", size * i, size) for i in range(BATCHES)],
        build_outer_optimizer(config, [{"params": list(model.parameters())}]),
    )


def _without_head(model: nn.Module) -> nn.Module:
    """The same network, with the same parameters, up to the features."""
    body = copy.copy(model)
    body._modules = dict(model._modules)
    body.head = nn.Identity()
    return body
