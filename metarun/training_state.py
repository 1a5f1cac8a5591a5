"""The state of a training run: made fresh, turned into a checkpoint, restored from one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metarun.algos.base import HYPER_PREFIX
from metarun.components import build_outer_optimizer
from metarun.config import TrainConfig
from metarun.errors import CheckpointError
from metarun.setup import Setup, to_plain


@dataclass
class TrainState:
    """All that changes during training.

    Attributes:
        meta: meta-parameters by name, leaf tensors that the outer optimizer changes in place.
        step: meta-steps done.
        best: {"step", "score", "ci95"} of the best validation so far.
        last_eval: step of the last validation.
        recent: one row of metrics for each meta-step since the last log line.
    """

    meta: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    step: int = 0
    best: dict[str, Any] | None = None
    last_eval: int = 0
    recent: list[Tensor] = field(default_factory=list)


def fresh(setup: Setup) -> TrainState:
    """The state before the first meta-step."""
    return _with_optimizer(setup, setup.algorithm.init())


def restore(setup: Setup, content: dict[str, Any]) -> TrainState:
    """The state that `snapshot` saved, on this setup's device.

    Raises:
        CheckpointError: the meta-parameters are not those of this setup.
    """
    state = _with_optimizer(setup, restore_meta(setup, content))
    state.optimizer.load_state_dict(content["outer_optimizer"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(content["scheduler"])
    state.step, state.best = content["step"], content["best"]
    state.last_eval = content["last_eval"]
    state.recent = [row.to(setup.device) for row in content["recent"]]
    torch.set_rng_state(content["rng"]["cpu"])
    if setup.device.type == "cuda" and content["rng"]["cuda"]:
        torch.cuda.set_rng_state(content["rng"]["cuda"][0], setup.device)
    return state


def restore_meta(setup: Setup, content: dict[str, Any]) -> dict[str, Tensor]:
    """The meta-parameters of a checkpoint, on this setup's device.

    Raises:
        CheckpointError: their names or shapes are not those of this setup.
    """
    expected = {name: tuple(value.shape) for name, value in setup.algorithm.init().items()}
    found = {name: tuple(value.shape) for name, value in content["meta"].items()}
    if expected != found:
        differing = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        name = differing[0]
        raise CheckpointError(
            f"the checkpoint does not fit this network: {name} has shape "
            f"{found.get(name, 'none')} there and {expected.get(name, 'none')} here"
        )
    return {name: value.to(setup.device) for name, value in content["meta"].items()}


def snapshot(setup: Setup, state: TrainState) -> dict[str, Any]:
    """The content of a checkpoint (see `metarun.checkpoint`)."""
    cuda = [torch.cuda.get_rng_state(setup.device)] if setup.device.type == "cuda" else []
    return {
        "config": to_plain(setup.config),
        "step": state.step,
        "meta": {name: value.detach() for name, value in state.meta.items()},
        "outer_optimizer": state.optimizer.state_dict(),
        "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
        "best": state.best,
        "last_eval": state.last_eval,
        "recent": list(state.recent),
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
    }


def _with_optimizer(setup: Setup, meta: dict[str, Tensor]) -> TrainState:
    config: TrainConfig = setup.config
    leaves = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
    weights = [v for name, v in leaves.items() if not name.startswith(HYPER_PREFIX)]
    learned = [v for name, v in leaves.items() if name.startswith(HYPER_PREFIX)]
    groups: list[dict[str, Any]] = [{"params": weights}]
    if learned:  # decaying a learning rate towards zero is never what weight decay is for
        groups.append({"params": learned, "weight_decay": 0.0})
    optimizer = build_outer_optimizer(config, groups)
    scheduler = None
    if config.outer_opt.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=config.trainer.steps, eta_min=config.outer_opt.min_lr
        )
    return TrainState(leaves, optimizer, scheduler)
