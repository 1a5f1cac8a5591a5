"""The outer loop."""

import math
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from metarun import checkpoint
from metarun.algos.base import HYPER_PREFIX
from metarun.errors import RunError
from metarun.evaluation import evaluate, format_score
from metarun.interrupts import Interrupted, Interruption
from metarun.setup import Setup
from metarun.tracking import Tracker
from metarun.training_state import TrainState, snapshot
from metarun.unroll import meta_gradient


def train(
    setup: Setup, state: TrainState, folder: Path, tracker: Tracker, stop: Interruption
) -> None:
    """Train from `state` to the last meta-step, with validations, logs and checkpoints.

    Each step is a function of the state alone: step `s` learns from the training episodes
    `s * meta_batch` and following, and a validation that is due takes place before the next
    step. So a run that is killed and goes on from a checkpoint computes the same.

    Args:
        folder: where checkpoints go.

    Raises:
        Interrupted: a signal came; the state has been saved.
        RunError: the loss, the gradient or the parameters are no longer finite.
    """
    config = setup.config.trainer
    with stop.deferred():
        try:
            while True:
                last = state.step == config.steps
                if state.last_eval < state.step and (last or state.step % config.eval_every == 0):
                    with tracker.paused():
                        validate(setup, state, folder, tracker, stop)
                if state.step > 0 and state.step % config.checkpoint_every == 0:
                    with tracker.paused():
                        save(setup, state, folder)
                if last:
                    break
                stop.check()
                meta_step(setup, state)
                tracker.advance()
                if state.step % config.log_every == 0 or state.step == config.steps:
                    log_recent(setup, state, tracker)
        except Interrupted:
            save(setup, state, folder)
            raise
        save(setup, state, folder)


def meta_step(setup: Setup, state: TrainState) -> None:
    """One update of the meta-parameters from one meta-batch of tasks.

    Nothing here waits for the GPU: metrics stay on the device until `log_recent`.
    """
    config, options = setup.config, setup.config.outer_opt
    size = config.trainer.meta_batch
    tasks = setup.source.sample("train", state.step * size, size)
    grads, extra = meta_gradient(
        setup.algorithm.loss, state.meta, tasks, setup.batching, config.engine.chunk
    )
    for name, leaf in state.meta.items():
        leaf.grad = grads[name]
    leaves = list(state.meta.values())
    norm = get_total_norm(list(grads.values()))
    if options.clip_value is not None:
        clip_grad_value_(leaves, options.clip_value)
        clipped_norm = get_total_norm(list(grads.values()))
    else:
        clipped_norm = norm
    if options.clip_norm is not None:
        clip_grads_with_norm_(leaves, options.clip_norm, clipped_norm)
    state.optimizer.step()
    if state.scheduler is not None:
        state.scheduler.step()
    state.step += 1
    outcome = torch.stack([extra["loss"].mean(), extra["score"].mean().to(norm.dtype), norm])
    state.recent.append(torch.cat([outcome, extra["inner_losses"].mean(dim=0)]))


def log_recent(setup: Setup, state: TrainState, tracker: Tracker) -> None:
    """Log the mean of the metrics since the last log line."""
    check_finite(state)
    loss, score, norm, *inner = torch.stack(state.recent).mean(dim=0).tolist()
    name = setup.objective.score_name
    values = {"train/loss": loss, f"train/{name}": score, "optim/grad_norm": norm}
    values["optim/lr"] = float(state.optimizer.param_groups[0]["lr"])
    values |= {f"inner/loss_step{i}": value for i, value in enumerate(inner)}
    values |= learned_hyper(state)
    values["time/tasks_per_s"] = tracker.steps_per_second() * setup.config.trainer.meta_batch
    if setup.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(setup.device)
        values["memory/max_allocated_gib"] = peak / 2**30
    tracker.metrics(state.step, values)
    tracker.show(state.step, {"loss": f"{loss:.4f}", name: format_score(name, score)})
    state.recent.clear()


def learned_hyper(state: TrainState) -> dict[str, float]:
    """Learned inner hyperparameters by tag: `inner/lr`, or `inner/lr_step0` … by step."""
    values = {}
    for name, value in state.meta.items():
        if name.startswith(HYPER_PREFIX):
            tag = "inner/" + name.removeprefix(HYPER_PREFIX)
            if value.dim() == 0:
                values[tag] = value.item()
            else:
                values |= {f"{tag}_step{i}": v for i, v in enumerate(value.tolist())}
    return values


def validate(
    setup: Setup, state: TrainState, folder: Path, tracker: Tracker, stop: Interruption
) -> None:
    """Score the validation tasks, always the same ones, and keep the best model."""
    check_finite(state)
    name, config = setup.objective.score_name, setup.config
    result = evaluate(
        setup.algorithm,
        setup.objective,
        state.meta,
        setup.source,
        "val",
        config.trainer.eval_episodes,
        setup.batching,
        config.engine.chunk,
        on_progress=lambda done: stop.check(),
    )
    state.last_eval = state.step
    loss = float(result.losses[:, -1].mean())
    tracker.metrics(
        state.step, {f"val/{name}": result.score, "val/ci95": result.ci95, "val/loss": loss}
    )
    best = state.best
    sign = 1 if setup.objective.higher_is_better else -1
    improved = math.isfinite(result.score) and (
        best is None or sign * result.score > sign * best["score"]
    )
    if improved:
        state.best = {"step": state.step, "score": result.score, "ci95": result.ci95}
        checkpoint.save_best(folder, snapshot(setup, state))
    shown = f"{format_score(name, result.score)} ± {format_score(name, result.ci95)}"
    tracker.note(state.step, f"val {name} {shown}{' (best so far)' if improved else ''}")


def save(setup: Setup, state: TrainState, folder: Path) -> None:
    """Write a checkpoint, but never one of a run that has gone wrong."""
    check_finite(state)
    checkpoint.save(folder, snapshot(setup, state))


def check_finite(state: TrainState) -> None:
    """Stop a run whose numbers are no longer finite, naming the meta-step.

    Raises:
        RunError: says when, and what usually helps.
    """
    bad_step = None
    if state.recent:
        finite = torch.stack(state.recent).isfinite().all(dim=1)
        if not finite.all():
            bad_step = state.step - len(finite) + 1 + int(finite.logical_not().nonzero()[0])
            what = "the loss or its gradient"
    if bad_step is None:
        if all(bool(value.isfinite().all()) for value in state.meta.values()):
            return
        bad_step, what = state.step, "a parameter"
    raise RunError(
        f"{what} became NaN or infinite at meta-step {bad_step}; checkpoints from before "
        "are kept. A lower inner_opt.lr or outer_opt.lr, or outer_opt.clip_norm=10, usually helps "
        "(in a new run directory)"
    )
