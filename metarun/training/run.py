"""A training run from its start, or its last checkpoint, to its result."""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarun.config.run import NEUTRAL_KEYS, TrainConfig, differing, flat
from metarun.config.shape import classes, shape_of
from metarun.config.typed import as_argument
from metarun.errors import ConfigError
from metarun.rundir.longer import STEPS, check_length

if TYPE_CHECKING:
    from metarun.system.ranks import Ranks  # imports torch
    from metarun.training.setup import Setup

log = logging.getLogger(__name__)


def run(config: TrainConfig, directory: str | Path) -> float:
    """Train, test and summarise one run; resume it if it was begun, recall it if it is done.

    Returns:
        The best validation score.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.rundir import directory as rundir
    from metarun.system.ranks import join
    from metarun.training import result as results
    from metarun.training.data_check import check_recalled
    from metarun.training.loggers import require_wandb
    from metarun.training.setup import to_plain

    ranks = join()
    directory = Path(ranks.broadcast_from_first(directory))  # the others have none of their own
    plain, result = to_plain(config), None
    first = ranks.broadcast_from_first(plain)
    with ranks.together():
        _check_same(plain, first)
        if ranks.count > config.trainer.meta_batch:
            raise ConfigError(
                f"trainer.meta_batch={config.trainer.meta_batch}: {ranks.count} processes need as "
                "many tasks or more; start fewer"
            )
        if ranks.first:
            result = rundir.finished_result(directory, plain)
            if result is not None and not results.is_whole(result):
                log.warning("%s is damaged: the run is tested again", directory / "result.json")
                result = None
            if result is not None:
                check_recalled(config, directory, result)
        require_wandb(config.trainer.wandb)
    result = ranks.broadcast_from_first(result)
    if result is not None:
        log.info("%s holds this run, finished: nothing to do", directory)
    else:
        result = _train(config, directory, ranks)
    print(results.summary(result, directory, config.plugins))
    return float(result["best"]["score"])


def _train(config: TrainConfig, directory: Path, ranks: "Ranks") -> dict[str, Any]:
    from metarun.episodes.examples import LabelledExamples
    from metarun.episodes.source import Batches
    from metarun.rundir import checkpoint, metrics
    from metarun.rundir import directory as rundir
    from metarun.system.interrupts import Interrupted, Interruption
    from metarun.system.lifetime import collect_from_here
    from metarun.system.ranks import LostRank
    from metarun.training import result as results
    from metarun.training import state as training_state
    from metarun.training.data_check import check_ranks, check_resumed
    from metarun.training.device import choose_device
    from metarun.training.inert import refuse_way, without_effect
    from metarun.training.loggers import Logged, open_loggers
    from metarun.training.loop import train
    from metarun.training.seen_classes import among_sources, by_weights, own_name
    from metarun.training.setup import build, to_plain
    from metarun.training.tracker import Tracker

    collect_from_here()
    plain, folder, content = to_plain(config), directory / "checkpoints", None
    agree = ranks.largest if ranks.count > 1 else None
    with Interruption(agree) as stop, contextlib.ExitStack() as held:
        with ranks.together():
            device = choose_device(config.device, ranks)
        results.forget_peak_memory(device)
        ranks = ranks.on(device)
        with ranks.together():
            setup = build(config, device, ranks)
            refuse_way(config, setup.source.kind)
        with ranks.together():
            check_ranks(setup)

        def load() -> None:
            nonlocal content
            logged = metrics.read_metrics(directory / "metrics.jsonl")
            content = checkpoint.load_newest(
                folder,
                lambda c: metrics.complete(logged, plain["trainer"], c["step"], c["last_eval"]),
            )
            if content is not None:
                _check_resumed(content["config"], plain, folder)
                _check_kept(content, plain["trainer"]["keep_best"])
                check_resumed(setup, content, directory)

        with ranks.together():
            if ranks.first:
                held.enter_context(rundir.opened(directory, plain, str(device), ranks.count, load))
        content = ranks.broadcast_from_first(content)
        if content is not None and content["planned_for"] != config.trainer.steps:
            setup = _planned_as_begun(setup, content["planned_for"])
        if content is None:
            state = training_state.fresh(setup)
        else:
            state = training_state.restore(setup, content)
            log.info("resuming after meta-step %d", state.step)
        each = f" (rank 0 of {ranks.count})" if ranks.count > 1 else ""
        plan = setup.plan
        several = f", {plan.threads} at a time" if plan.threads > 1 else ""
        tasks = f"tasks by {plan.batching}{several}"
        if setup.algorithm.one_model is not None:
            tasks = "one model"
        log.info("run directory %s, device %s%s, %s", directory, device, each, tasks)
        if setup.algorithm.steps is not None:
            _tell_of_other_inner_steps(*setup.algorithm.steps)
        _tell_of_hessians(setup)
        if not setup.algorithm.learns:
            log.info(
                "algo=%s meta-learns nothing: there are no meta-steps, and %strainer.steps, "
                "trainer.meta_batch and outer_opt have no effect",
                config.algo.name,
                "" if state.meta else "backbone, ",
            )
        if isinstance(setup.train_tasks, Batches):
            log.info(
                "training learns from plain batches: its accuracy is over all %d training classes, "
                "that of validation and test over the %s of a task",
                setup.train_tasks.classes,
                classes(shape_of(config.task)),
            )
        if isinstance(setup.source, LabelledExamples):
            log.info("%s", setup.source.described())
        source = setup.source
        if unused := without_effect(config, source.kind, source.outputs, source):
            log.warning("without effect: %s", "; ".join(unused))
        with ranks.together():
            own = own_name(config.data)
            remark = among_sources(setup.source, "test", ["val"], own) | by_weights(setup, "test")
        described = Logged(directory, flat(plain), setup.objective.score_name)
        try:
            with Tracker(
                directory if ranks.first else None,
                state.step,
                state.last_eval,
                setup.steps,
                state.elapsed,
                open_loggers(described) if ranks.first else (),
            ) as tracker:
                train(setup, state, folder, tracker, stop)
                return results.finish(setup, state, directory, tracker, stop, remark)
        except (Interrupted, LostRank) as end:
            end.args = (f"{end} after meta-step {state.step}; checkpoints are in {folder}",)
            if isinstance(end, LostRank):
                end.args = (f"{end}: {as_argument('hydra.run.dir', directory)} goes on from there",)
            raise


def _planned_as_begun(setup: "Setup", steps: int) -> "Setup":
    """The setup of a run that has become longer, computed as when it began."""
    from metarun.training.setup import build

    with setup.ranks.together():
        begun = build(setup.config, setup.device, setup.ranks, steps)
    if begun.plan != setup.plan:
        log.info(
            "computed as the run of %d meta-steps that it began as; one of %d from the start "
            "would be computed otherwise (engine.compile), and may round otherwise",
            steps,
            setup.config.trainer.steps,
        )
    return begun


def _tell_of_other_inner_steps(own: int, later: int) -> None:
    """Who raises the inner steps may forget that those of evaluation are set apart."""
    if later < own:
        log.info(
            "tasks get %d inner steps in training, but %d in validation and test "
            "(algo.eval_inner_steps)",
            own,
            later,
        )


SLOW_HESSIAN = 256
"""Elements from which on a Hessian in each inner step takes longer than all else."""


def _tell_of_hessians(setup: "Setup") -> None:
    """Newton's method is for a head: on a whole network it takes minutes without a word."""
    inner, size = setup.config.inner_opt, setup.parameters["adapted"] or 0
    if any(part.get("joint") is False for part in (vars(inner), *inner.groups)):
        log.warning(
            "joint=false takes the rows of a parameter as independent of each other; those of a "
            "network are not, so the steps are not those of Newton's method"
        )
    if getattr(inner, "joint", False) and size >= SLOW_HESSIAN:
        log.warning(
            "inner_opt=%s takes a Hessian of %d x %d in each inner step of each task, which is "
            "slow; algo.adapt=[head.*] adapts the head alone",
            inner.name,
            size,
            size,
        )


def _check_same(config: dict[str, Any], first: dict[str, Any]) -> None:
    """Refuse a rank that was started with another config than rank 0."""
    own, wanted = flat(config), flat(first)
    for key in sorted(own.keys() | wanted.keys()):
        if own.get(key) != wanted.get(key) and key not in NEUTRAL_KEYS:
            raise ConfigError(
                f"started with {key}={own.get(key)}, but rank 0 with {key}={wanted.get(key)}: give "
                "all processes of a run the same command"
            )


def _check_resumed(stored: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of another config: config.yaml is not the only file that can be lost."""
    there, here = flat(stored), flat(config)
    for key in differing(stored, config):
        if key != STEPS:
            raise ConfigError(
                f"the checkpoints in {folder} are of another config ({key}: {there.get(key)} "
                f"there, {here.get(key)} here): choose another hydra.run.dir"
            )
    check_length(there, here, folder)


def _check_kept(content: dict[str, Any], keep_best: int) -> None:
    """Refuse to keep more of the best checkpoints than before, once some may have been dropped."""
    before = content["config"]["trainer"].get("keep_best", 1)
    if keep_best > before and len(content["top"]) >= before:
        raise ConfigError(
            f"trainer.keep_best={keep_best}: the run has kept {before} of its best checkpoints so "
            "far, and the next best are gone: later ones in their place would not be the best of "
            f"the run. Keep trainer.keep_best={before}, or choose another hydra.run.dir"
        )
