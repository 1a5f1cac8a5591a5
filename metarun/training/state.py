"""The state of a training run: made fresh, turned into a checkpoint, restored from one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metarun.components.algo.normalising import PREFIX
from metarun.components.build import build_outer_optimizer
from metarun.config.run import TrainConfig
from metarun.errors import CheckpointError
from metarun.rundir.checkpoint_fields import ELAPSED_FIELD, same_structure
from metarun.training import metrics
from metarun.training.domain import KEY as EXAMPLES
from metarun.training.domain import examples_of
from metarun.training.metrics import Metrics
from metarun.training.outer_groups import outer_groups
from metarun.training.setup import Setup, to_plain


@dataclass
class TrainState:
    """All that changes during training.

    Attributes:
        meta: meta-parameters by name, leaf tensors that the outer optimizer changes in place; and
            what the algorithm keeps beside them.
        step: meta-steps done.
        skipped: how many of them changed nothing, because their gradient was not finite.
        best: {"step", "score", "ci95"} of the best validation so far.
        top: the same of the best few, the best first.
        last_eval: step of the last validation.
        recent: the metrics of each meta-step since the last log line.
        elapsed: seconds that the run has taken up to its last checkpoint, in all attempts.
    """

    meta: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    step: int = 0
    skipped: int = 0
    best: dict[str, Any] | None = None
    top: list[dict[str, Any]] = field(default_factory=list)
    last_eval: int = 0
    recent: list[Metrics] = field(default_factory=list)
    elapsed: float = 0.0


def fresh(setup: Setup) -> TrainState:
    """The state before the first meta-step."""
    return _with_optimizer(setup, setup.algorithm.init())


def restore(setup: Setup, content: dict[str, Any]) -> TrainState:
    """The state that `snapshot` saved, on this setup's device.

    Args:
        content: a checkpoint that `metarun.rundir.checkpoint.load` has let pass.

    Raises:
        CheckpointError: it does not fit this setup.
    """
    steps = setup.config.trainer.steps
    if content["step"] > steps:
        raise CheckpointError(
            f"the checkpoint is of meta-step {content['step']}, beyond the {steps} of this run"
        )
    state = _with_optimizer(setup, restore_meta(setup, content))
    _restore_optimizer(setup, state, content)
    state.step, state.skipped = content["step"], content["skipped"]
    state.best, state.last_eval = content["best"], content["last_eval"]
    state.top = content["top"]
    state.elapsed = content.get(ELAPSED_FIELD, 0.0)
    state.recent = metrics.from_plain(content["recent"], setup.device)
    by_rank = content.get("chunks", [])
    if len(by_rank) == setup.ranks.count:  # with other ranks, tasks are shared otherwise, too
        for program, chunk in by_rank[setup.ranks.rank].items():
            if program in setup.chunks:
                setup.chunks[program].take(chunk)
    try:
        torch.set_rng_state(content["rng"]["cpu"])
        if setup.device.type == "cuda" and content["rng"]["cuda"]:
            torch.cuda.set_rng_state(content["rng"]["cuda"][0], setup.device)
    except RuntimeError as error:
        raise CheckpointError("the checkpoint's random state is none of torch's") from error
    return state


def _restore_optimizer(setup: Setup, state: TrainState, content: dict[str, Any]) -> None:
    """Load the outer optimizer and its schedule, if they are those of this setup.

    torch checks little of what it loads and would stumble over it at the next step. What a
    state looks like after a step is seen from an optimizer that takes one on copies.
    """
    trial = _with_optimizer(setup, state.meta)
    for leaf in trial.meta.values():
        if leaf.requires_grad:
            leaf.grad = torch.zeros_like(leaf)
    trial.optimizer.step()
    stored = content["outer_optimizer"]
    expected = trial.optimizer.state_dict()
    if not stored["state"]:  # before the first step
        expected["state"] = {}
    same_structure(expected, stored, "the checkpoint's outer_optimizer")
    state.optimizer.load_state_dict(stored)
    if state.scheduler is not None:
        expected = state.scheduler.state_dict()
        same_structure(expected, content["scheduler"], "the checkpoint's scheduler")
        state.scheduler.load_state_dict(content["scheduler"])


def restore_meta(setup: Setup, content: dict[str, Any]) -> dict[str, Tensor]:
    """The meta-parameters of a checkpoint, on this setup's device; the network gets its buffers.

    Raises:
        CheckpointError: their names, shapes or types are not those of this setup.
    """
    network, wanted = setup.network, setup.algorithm.kept
    # Moving averages that this evaluation has no use for.
    meta = {
        name: value
        for name, value in content["meta"].items()
        if name in wanted or not name.startswith(PREFIX)
    }
    _check_forms(setup.algorithm.init(), meta)
    free = set(network.changing)  # may also appear or change its shape
    _check_forms(_without(network.buffers(), free), _without(content["buffers"], free))
    _check_forms(network.frozen_values(), content["frozen"])
    network.put(
        {name: value.to(setup.device) for name, value in content["buffers"].items()},
        {name: value.to(setup.device) for name, value in content["frozen"].items()},
    )
    return {name: value.to(setup.device) for name, value in meta.items()}


def _without(values: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name not in names}


def _check_forms(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    expected = {name: _form(value) for name, value in wanted.items()}
    found = {name: _form(value) for name, value in given.items()}
    if expected != found:
        name = min(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise CheckpointError(
            f"the checkpoint does not fit this network: {name[:120]} is "
            f"{found.get(name, 'not')} there and {expected.get(name, 'not')} here"
        )


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def chunks_found(setup: Setup) -> list[dict[str, int]]:
    """How many tasks at a time fitted into memory, by rank and program. All ranks call this."""
    if not setup.chunks:
        return []
    own = {name: fitted.chunk for name, fitted in setup.chunks.items() if fitted.chunk}
    return setup.ranks.gather(own)


def snapshot(
    setup: Setup, state: TrainState, chunks: Sequence[dict[str, int]] = ()
) -> dict[str, Any]:
    """The content of a checkpoint (see `metarun.rundir.checkpoint`).

    Args:
        chunks: as of `chunks_found`.
    """
    cuda = [torch.cuda.get_rng_state(setup.device)] if setup.device.type == "cuda" else []
    return {
        "config": to_plain(setup.config),
        "planned_for": setup.planned_for,
        "step": state.step,
        "skipped": state.skipped,
        "meta": {name: value.detach() for name, value in state.meta.items()},
        "outer_optimizer": state.optimizer.state_dict(),
        "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
        "best": state.best,
        "top": state.top,
        "last_eval": state.last_eval,
        "recent": metrics.to_plain(state.recent),
        ELAPSED_FIELD: round(state.elapsed, 3),
        "data_identity": setup.identity,
        EXAMPLES: examples_of(setup.source),
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        "buffers": setup.network.buffers(),
        "frozen": setup.network.frozen_values(),
        "chunks": list(chunks),
    }


def _with_optimizer(setup: Setup, meta: dict[str, Tensor]) -> TrainState:
    config: TrainConfig = setup.config
    kept = set(setup.algorithm.kept if setup.algorithm.learns else meta)
    copies = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in meta.items()
    }
    leaves = {n: v if n in kept else v.requires_grad_() for n, v in copies.items()}
    learned = {name: value for name, value in leaves.items() if value.requires_grad}
    optimizer = build_outer_optimizer(config, outer_groups(config.outer_opt, learned))
    scheduler = None
    if config.outer_opt.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=config.trainer.steps, eta_min=config.outer_opt.min_lr
        )
    return TrainState(leaves, optimizer, scheduler)
