"""The outer loop."""

import hashlib
import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from metarun.components.algo.base import HYPER_PREFIX, HYPERPARAMETERS
from metarun.components.algo.inner_loop import TENSORS
from metarun.episodes.rng import stream_key
from metarun.errors import CheckpointError, RunError
from metarun.rundir import checkpoint
from metarun.system.interrupts import Interrupted, Interruption
from metarun.training.evaluation import evaluate_split, format_score
from metarun.training.meta_gradient import of_meta_batch
from metarun.training.metrics import Metrics, are_alike, is_finite, stacked
from metarun.training.setup import Setup
from metarun.training.state import TrainState, chunks_found, snapshot
from metarun.training.tracker import Tracker
from metarun.unroll._torch import pytree

log = logging.getLogger(__name__)

REMEDY = (
    "A lower inner_opt.lr or outer_opt.lr, or outer_opt.clip_norm=10, usually helps (in a new run "
    "directory)"
)


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
        LostRank: another rank of the run is gone.
        RunError: the loss, the gradient or the parameters are no longer finite, or that was so
            more often than may be skipped.
    """
    config = setup.config.trainer
    with stop.deferred():
        try:
            while True:
                last = state.step == setup.steps
                new = state.last_eval < state.step or (setup.steps == 0 and not state.top)
                if new and (last or state.step % config.eval_every == 0):
                    with tracker.paused():
                        validate(setup, state, folder, tracker, stop)
                due = state.step > 0 and state.step % config.checkpoint_every == 0
                if stop.save_wanted() or due:
                    with tracker.paused():
                        save(setup, state, folder, tracker)
                if last:
                    break
                stop.check()
                meta_step(setup, state)
                tracker.advance()
                if state.step % config.log_every == 0 or state.step == setup.steps:
                    log_recent(setup, state, tracker)
        except Interrupted:
            save(setup, state, folder, tracker)
            raise
        save(setup, state, folder, tracker)


def meta_step(setup: Setup, state: TrainState) -> None:
    """One update of the meta-parameters from one meta-batch of tasks.

    Each rank takes a share of the tasks; then all take the same step. Nothing here waits for the
    GPU, but in the first step and where steps may be skipped: metrics stay on the device until
    `log_recent`.
    """
    config, options, ranks = setup.config, setup.config.outer_opt, setup.ranks
    size = config.trainer.meta_batch
    start, own = ranks.share(size)
    if not ranks.first:  # each rank draws dropout masks of its own, the same after a resume
        torch.manual_seed(stream_key("rank", config.seed, ranks.rank, state.step))
    tasks = setup.train_tasks.sample(state.step * size + start, own)
    may_skip, network = config.trainer.nonfinite == "skip", setup.network
    buffers = network.buffers() if may_skip and network.changing else {}
    grads, metrics = of_meta_batch(setup, state, tasks, own / size)
    names = set(setup.algorithm.kept)
    kept = {name: value.detach() for name, value in grads.items() if name in names}
    learned = {name: leaf for name, leaf in state.meta.items() if name not in names}
    grads = {name: grads[name] for name in learned}
    if ranks.count > 1:
        metrics = metrics._replace(gradient_norm=get_total_norm(list(grads.values())))
    state.step += 1
    if may_skip and not bool(is_finite(metrics)):  # waits for the GPU
        if network.changing:
            network.put(buffers)
        skip(state, config.trainer.max_skipped)
        return
    if state.step == 1 and ranks.first:
        tell_unlearned(grads)
    grads = {name: laid_out_as(leaf, grads[name]) for name, leaf in learned.items()}
    for name, leaf in learned.items():
        leaf.grad = grads[name]  # no copy: the norm is taken of what clipping leaves
    leaves = list(learned.values())
    if options.clip_value is not None:
        clip_grad_value_(leaves, options.clip_value)
        clipped_norm = get_total_norm(list(grads.values()))
    else:
        clipped_norm = metrics.gradient_norm
    if options.clip_norm is not None:
        clip_grads_with_norm_(leaves, options.clip_norm, clipped_norm)
    state.optimizer.step()
    state.meta |= kept
    if setup.advance is not None:
        state.meta |= setup.advance(state.meta, tasks, state.step)
    if state.scheduler is not None:
        state.scheduler.step()
    if state.recent and not are_alike(state.recent[-1], metrics):
        raise CheckpointError("the checkpoint's recent metrics are not of this run")
    state.recent.append(metrics)


def tell_unlearned(grads: dict[str, Tensor]) -> None:
    """Name the layers whose meta-gradient is exactly zero: only decay would move them.

    If it is zero everywhere, another line says what may be the reason. A bias alone may have none:
    normalisation takes it away again.
    """
    moving = torch.stack([grad.any() for grad in grads.values()]).tolist()  # waits for the GPU once
    moves = {n.rpartition(".")[0] for n, moved in zip(grads, moving, strict=True) if moved}
    zero = [n for n in grads if n.rpartition(".")[0] not in moves]
    if not moves:
        log.warning(
            "the first meta-gradient is exactly zero: nothing is learned from such tasks. The loss "
            "is the same whatever the parameters are, or the network detaches what it gives "
            "(no_grad, detach); with engine.solver=cg, the inner loop may have ended where the "
            "loss curves down (raise engine.proximal)"
        )
    elif zero:
        more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
        log.warning(
            "the first meta-gradient of %s%s is exactly zero: the network does not use it, or "
            "detaches what it gives (no_grad, detach); requires_grad_(False) would freeze it",
            ", ".join(zero[:3]), more,
        )  # fmt: skip


def laid_out_as(leaf: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the strides of its parameter.

    torch's fused optimizers on a CPU take those for granted (torch 2.15), and would give each
    element the step of another one.
    """
    return grad if grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)


def skip(state: TrainState, most: int) -> None:
    """Count a meta-step that changes nothing, since its loss or gradient is not finite.

    Raises:
        RunError: more than `most` have been skipped.
    """
    state.skipped += 1
    if state.skipped > most:
        raise RunError(
            f"meta-step {state.step} had a loss or a gradient that is NaN or infinite, as had "
            f"{most} before it, which is all that trainer.max_skipped={most} allows. {REMEDY}"
        )


def log_recent(setup: Setup, state: TrainState, tracker: Tracker) -> None:
    """Log the mean of the metrics since the last log line."""
    check_finite(state)
    name = setup.objective.score_name
    values, shown = {}, {}
    if state.recent:  # else all have been skipped
        means: Metrics = pytree.tree_map(lambda x: x.mean(dim=0).tolist(), stacked(state.recent))
        loss, score = float(means.loss), float(means.score)
        values = {"train/loss": loss, f"train/{name}": score}
        values |= {"optim/grad_norm": float(means.gradient_norm)}
        values |= {f"inner/loss_step{i}": v for i, v in enumerate(means.inner_losses)}
        values |= {f"train/{own}": float(v) for own, v in means.own.items()}
        shown = {"loss": f"{loss:.4f}", name: format_score(name, score)}
    if setup.config.trainer.nonfinite == "skip":
        values["train/skipped"] = state.skipped
        shown |= {"skipped": str(state.skipped)} if state.skipped else {}
    values["optim/lr"] = float(state.optimizer.param_groups[0]["lr"])
    values |= learned_hyper(state)
    values["time/tasks_per_s"] = tracker.steps_per_second() * setup.config.trainer.meta_batch
    if setup.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(setup.device)
        values["memory/max_allocated_gib"] = peak / 2**30
    tracker.metrics(state.step, values)
    tracker.show(state.step, shown)
    state.recent.clear()


def learned_hyper(state: TrainState) -> dict[str, float]:
    """Learned inner hyperparameters by tag: `inner/lr`, or `inner/lr_step0` … by step."""
    values = {}
    for name, value in state.meta.items():
        if name.startswith(HYPERPARAMETERS) and not name.startswith(TENSORS):
            inner = name.startswith(HYPER_PREFIX)
            tag = ("inner/" if inner else "algo/") + name.partition(".")[2]
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
    check_constant(setup, state)
    setup.recheck()
    name, config = setup.objective.score_name, setup.config
    result = evaluate_split(
        setup,
        setup.trace,
        state.meta,
        "val",
        config.trainer.eval_episodes,
        lambda done: stop.check(),
    )
    state.last_eval = state.step
    loss = float(result.losses[:, -1].mean())
    tracker.metrics(
        state.step, {f"val/{name}": result.score, "val/ci95": result.ci95, "val/loss": loss}
    )
    improved = remember(setup, state, {"score": result.score, "ci95": result.ci95})
    top = [kept["step"] for kept in state.top]
    with setup.ranks.together():
        state.elapsed = tracker.elapsed()
        if state.step in top and setup.ranks.first:
            checkpoint.save_best(folder, snapshot(setup, state), top, config.trainer.keep_best)
    shown = f"{format_score(name, result.score)} ± {format_score(name, result.ci95)}"
    tracker.note(state.step, f"val {name} {shown}{' (best so far)' if improved else ''}")


def remember(setup: Setup, state: TrainState, validation: dict[str, float]) -> bool:
    """Put a validation in its place among the best ones; says whether it is the best so far.

    Of equal ones the earlier is better.
    """
    if math.isfinite(validation["score"]):
        sign = -1 if setup.objective.higher_is_better else 1
        state.top.append({"step": state.step, **validation})
        state.top.sort(key=lambda kept: (sign * kept["score"], kept["step"]))
        del state.top[setup.config.trainer.keep_best :]
        state.best = state.top[0]
    return state.best is not None and state.best["step"] == state.step


def save(setup: Setup, state: TrainState, folder: Path, tracker: Tracker) -> None:
    """Write a checkpoint, but never one of a run that has gone wrong."""
    check_finite(state)
    check_constant(setup, state)
    check_same(setup, state)
    config, chunks = setup.config.trainer, chunks_found(setup)
    with setup.ranks.together():
        if setup.ranks.first:
            tracker.sync()
            state.elapsed = tracker.elapsed()
            content = snapshot(setup, state, chunks)
            checkpoint.save(folder, content, config.keep_last, config.keep_every)


def check_same(setup: Setup, state: TrainState) -> None:
    """Stop a run whose ranks have come to different parameters.

    Raises:
        RunError: says which.
    """
    if setup.ranks.count == 1:
        return
    digest = hashlib.sha256()
    for value in state.meta.values():
        digest.update(value.detach().flatten().cpu().numpy().tobytes())
    for own in (setup.network.buffers(), setup.network.frozen_values()):
        for value in own.values():
            digest.update(value.flatten().view(torch.uint8).cpu().numpy().tobytes())
    digests = setup.ranks.gather(digest.digest())
    if differing := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise RunError(
            f"the parameters of rank {differing[0]} are no longer those of rank 0 at meta-step "
            f"{state.step}: one of the machines does not compute as the others do. Checkpoints "
            "from before are kept"
        )


def check_constant(setup: Setup, state: TrainState) -> None:
    """Stop a run whose network has changed a buffer that it did not change at the start.

    Raises:
        RunError: says which, and what to do.
    """
    if not setup.network.changing and (changed := setup.network.changed()):
        raise RunError(
            f"the backbone has changed its buffer {changed[0]} by meta-step {state.step}, but not "
            "in the first look at it, so tasks were not computed one after the other; checkpoints "
            "from before are kept. Change buffers whenever the network is called in training, or "
            "never (in a new run directory)"
        )


def check_finite(state: TrainState) -> None:
    """Stop a run whose numbers are no longer finite, naming the meta-step.

    Raises:
        RunError: says when, and what usually helps.
    """
    bad_step = None
    if state.recent:
        finite = is_finite(stacked(state.recent))
        if not finite.all():
            bad_step = state.step - len(finite) + 1 + int(finite.logical_not().nonzero()[0])
            what = "the loss or its gradient"
    if bad_step is None:
        if all(bool(value.isfinite().all()) for value in state.meta.values()):
            return
        bad_step, what = state.step, "a parameter"
    raise RunError(
        f"{what} became NaN or infinite at meta-step {bad_step}; checkpoints from before "
        f"are kept. {REMEDY}; trainer.nonfinite=skip goes on without such meta-steps"
    )
