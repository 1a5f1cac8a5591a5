"""From a case's settings to what the peers work on: the network, the tasks, the outer Adam."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import pixels
from metarun.components.algo.base import OBJECTIVES
from metarun.components.algo.descent import DescentConfig
from metarun.components.build import (
    build_algorithm,
    build_data,
    build_model,
    build_outer_optimizer,
)
from metarun.config.compose import composed
from metarun.config.run import TrainConfig
from metarun.episodes.source import Episodes

BATCHES = 5
"""Meta-batches that peers take in turn; the gradient check takes as many meta-steps."""


class Problem(NamedTuple):
    """One case for a peer.

    Attributes:
        algo: the settings of the algorithm.
        body: what is in front of the adapted part: the network without its head for ANIL and for
            heads in closed form, else the identity.
        adapted: what the inner loop adapts: the whole network, or ANIL's head.
        loss: `loss(outputs, targets)`, a mean over examples.
        way: outputs of the network.
        lr: of the inner SGD, where it is not learned.
        steps: inner steps.
        first_order: whether inner gradients are constants.
        parameters: all that is learned by name: of the network, and what the algorithm adds; a
            peer leaves the meta-gradient in their `grad`.
        batches: meta-batches of tasks, drawn by metarun's source.
        outer: over `parameters`.
    """

    algo: Any
    body: nn.Module
    adapted: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    way: int
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
    learned = build_algorithm(config, model, source).init()
    own = dict(model.named_parameters())
    parameters = {n: own[n] if n in own else nn.Parameter(v.clone()) for n, v in learned.items()}
    algo, size = config.algo, config.trainer.meta_batch
    descends = isinstance(algo, DescentConfig)
    split = not descends or algo.name == "anil"
    return Problem(
        algo,
        without_head(model) if split else nn.Identity(),
        model.get_submodule("head") if split else model,
        OBJECTIVES[source.kind].loss,
        source.outputs,
        config.inner_opt.lr,
        algo.inner_steps if descends else 0,
        descends and algo.order == 1,
        parameters,
        [source.sample("train", size * i, size) for i in range(BATCHES)],
        build_outer_optimizer(config, [{"params": list(parameters.values())}]),
    )


def without_head(model: nn.Module) -> nn.Module:
    """The same network, with the same parameters, up to the features."""
    body = copy.copy(model)
    body._modules = dict(model._modules)
    body.head = nn.Identity()
    return body
