"""The end of a run: the test, result.json, and the summary that a person reads."""

import contextlib
import logging
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from metarun.config.run import TaskConfig, differing
from metarun.config.shape import shape_of, shots, ways
from metarun.config.typed import as_argument, as_path
from metarun.episodes.identity import task_set
from metarun.errors import RunError
from metarun.rundir import checkpoint
from metarun.rundir.longer import STEPS
from metarun.rundir.top import load_each
from metarun.system.files import write_json
from metarun.system.interrupts import Interruption
from metarun.training.data_check import data_words
from metarun.training.ensemble import ensemble_trace
from metarun.training.evaluation import Evaluation, evaluate_split, format_score
from metarun.training.programs import Traces
from metarun.training.seen_classes import seen_words
from metarun.training.setup import Setup, to_plain
from metarun.training.state import TrainState, restore_meta
from metarun.training.tracker import Tracker
from metarun.unroll import Meta

log = logging.getLogger(__name__)


def finish(
    setup: Setup,
    state: TrainState,
    directory: Path,
    tracker: Tracker,
    stop: Interruption,
    remark: dict[str, Any],
) -> dict[str, Any]:
    """Test the model that was best on validation, and store the run's final figures.

    Args:
        remark: what they say of test classes that were seen before.

    Raises:
        Interrupted: a signal came.
        LostRank: another rank of the run is gone.
        RunError: no validation had a finite score, so there is no best model.
    """
    if state.best is None:
        raise RunError(
            "no validation had a finite score: a lower outer_opt.lr, inner_opt.lr or "
            "algo.eval_inner_steps may help (in a new run directory)"
        )
    seconds = tracker.elapsed()
    ranks, content = setup.ranks, {}
    with ranks.together():
        if ranks.first:
            content = checkpoint.load_best(
                directory / "checkpoints", state.best["step"], _is_of(setup)
            )
    content = ranks.broadcast_from_first(content)
    start = time.perf_counter()
    setup.recheck()
    evaluation = _tested(setup, setup.trace, restore_meta(setup, content), stop)
    name = setup.objective.score_name
    test, together = (
        describe(setup, evaluation, "test") | remark,
        _of_ensemble(setup, state, directory, stop),
    )
    curves = {f"test/{n}_by_inner_step": test[f"{n}_per_inner_step"] for n in (name, "loss")}
    figures = {
        f"test/{name}": test[name],
        "test/loss": test["loss_per_inner_step"][-1],
        f"val/best_{name}": state.best["score"],
    }
    if together:
        figures[f"test/ensemble_{name}"] = together[name]
    tracker.final(figures, curves, state.step)
    result = {
        "test": test,
        **({"ensemble": together | remark} if together else {}),
        "best": state.best,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "train_seconds": round(seconds, 2),
        "test_seconds": round(time.perf_counter() - start, 2),
        "parameters": setup.parameters,
        "device": device_name(setup.device),
        "ranks": ranks.count,
        "peak_memory_gib": peak_memory_gib(setup.device),
    }
    if ranks.first:
        write_json(directory / "result.json", result)
    return result


def _is_of(setup: Setup) -> Callable[[dict[str, Any]], bool]:
    """Whether a checkpoint is of a run; it may have become longer since."""
    own = to_plain(setup.config)
    return lambda stored: set(differing(stored["config"], own)) <= {STEPS}


def _tested(setup: Setup, trace: Traces, meta: Meta, stop: Interruption) -> Evaluation:
    with stop.deferred():
        return evaluate_split(
            setup,
            trace,
            meta,
            "test",
            setup.config.trainer.test_episodes,
            lambda done: stop.check(),
        )


def _of_ensemble(
    setup: Setup, state: TrainState, directory: Path, stop: Interruption
) -> dict[str, Any]:
    """The test of the best checkpoints together, if the run is to have one."""
    wanted, ranks, contents = setup.config.trainer.ensemble, setup.ranks, []
    best = state.top[:wanted]
    if wanted is None:
        return {}
    if len(best) < wanted:
        log.warning("trainer.ensemble=%d: only %d validations had a score", wanted, len(best))
    with ranks.together():
        if ranks.first:
            contents = load_each(directory / "checkpoints", best, _is_of(setup))
    contents = ranks.broadcast_from_first(contents)
    metas = [restore_meta(setup, content) for content in contents]
    trace = ensemble_trace(setup, contents, metas)
    return describe(setup, _tested(setup, trace, metas[0], stop), "test", best)


def describe(
    setup: Setup,
    evaluation: Evaluation,
    split: str,
    ensemble: Sequence[dict[str, Any]] = (),
    trained: TaskConfig | None = None,
) -> dict[str, Any]:
    """An evaluation's figures with the protocol that they were measured under.

    Args:
        split: whose tasks they were.
        ensemble: the validations of the checkpoints whose outputs were averaged; empty: one alone.
        trained: the shape of the training tasks; None: that of the config.
    """
    config, trained = setup.config, trained or setup.config.task.in_training()
    figures = evaluation.summary()
    if setup.algorithm.one_model is not None:
        figures |= {"inner_steps": None, "classes": setup.source.outputs}
    elif not setup.algorithm.has_inner_loop:
        figures["inner_steps"] = None
    if not setup.algorithm.learns:
        figures["meta_learned"] = False
    if setup.algorithm.transductive:
        figures["transductive"] = True
    if ensemble:
        figures["ensemble"] = list(ensemble)
    on_tasks = setup.algorithm.learns and setup.algorithm.batch_size is None
    if on_tasks and setup.algorithm.one_model is None and trained != config.task:
        shape: dict[str, Any] = shape_of(trained)
        if trained.within != config.task.within:
            shape["within"] = trained.within
        figures["trained_on"] = shape
    if names := getattr(setup.source, "names", ()):
        figures["per_source"] = evaluation.by_turns(names)
    if getattr(setup.source, "reports_error", False):
        figures["error"] = 1 - figures[setup.objective.score_name]
    if config.task.within != "all":
        figures["within"] = config.task.within
    task_shape: dict[str, Any] = {}
    if setup.algorithm.one_model is None:
        task_shape = shape_of(config.task)
        drawn = {**task_shape, "within": config.task.within}
        figures["task_set"] = task_set(setup.identity, split, config.seed, drawn)
    return {
        **figures,
        "score": setup.objective.score_name,
        "algo": config.algo.name,
        "data": config.data.name,
        "data_identity": setup.identity,
        **task_shape,
        "seed": config.seed,
        "batch_norm": setup.batch_norm,
    }


WITHIN = {None: "", "group": " within a group", "all": " of all classes"}
"""How a result line says of what the classes of a task are drawn, where that has to be said."""


def line(figures: dict[str, Any], split: str) -> str:
    """One line with a figure, its confidence interval and its protocol."""
    name = figures["score"]
    if "classes" in figures:
        scored = f"{figures['examples']} examples of {figures['classes']} classes"
    elif name == "accuracy":
        scored = f"{figures['episodes']} tasks, {ways(figures)} {shots(figures)}"
        scored += f"{WITHIN[figures.get('within')]}, {figures['query']} queries a class"
    else:
        scored = f"{figures['episodes']} tasks, {figures['shot']} shots, {figures['query']} queries"
    other = data_words(figures) + seen_words(figures, split)
    if trained := figures.get("trained_on"):
        of_ways = f"{ways(trained)} " if name == "accuracy" else ""
        queries = "" if trained["query"] == figures["query"] else f", {trained['query']} queries"
        within = WITHIN[trained.get("within")]
        other = f", trained on {of_ways}{shots(trained)}{within}{queries}{other}"
    if not figures.get("meta_learned", True):
        other += ", nothing meta-learned"
    steps = figures["inner_steps"]
    inner = "" if steps is None else f"{steps} inner steps, "
    if ensemble := figures.get("ensemble"):
        inner += f"mean outputs of {len(ensemble)} checkpoints, "
    if figures.get("transductive"):
        inner += "adapted to the queries together (transductive), "
    error = f", error {100 * figures['error']:.2f} %" if "error" in figures else ""
    return (
        f"{split} {name} {format_score(name, figures[name])} ± "
        f"{format_score(name, figures['ci95'])}{error} (95 % CI; {scored}, "
        f"{inner}batch norm: {figures['batch_norm']}{other})"
    )


MOST_SHOWN = 12  # scores in a line


def per_inner_step(figures: dict[str, Any]) -> list[str]:
    """A line with the score before adaptation and after each inner step, if there are any."""
    if figures["inner_steps"] is None:
        return []
    name = figures["score"]
    values = [format_score(name, value) for value in figures[f"{name}_per_inner_step"]]
    shown, after = values, "0, 1, …"
    if len(values) > MOST_SHOWN:
        last = len(values) - 1
        round_ones = (0, *(d * 10**e for e in range(6) for d in (1, 2, 5)))
        steps = [step for step in round_ones if step < last]
        shown, after = [values[s] for s in [*steps, last]], ", ".join(map(str, [*steps, last]))
    return [f"{name} after {after} inner steps: {', '.join(shown)}"]


def per_source(figures: dict[str, Any]) -> list[str]:
    """A line with the score on each of several sources, if there are any."""
    name = figures["score"]
    shown = [
        f"{source} {format_score(name, own[name])} ± {format_score(name, own['ci95'])} "
        f"({own['episodes']} tasks)"
        for source, own in figures.get("per_source", {}).items()
    ]
    return [f"{name} on each: {', '.join(shown)}"] if shown else []


def is_whole(result: dict[str, Any]) -> bool:
    """Whether a stored result has all that is shown of one: its file may have been damaged."""
    try:
        return bool(summary(result, Path())) and type(result["best"]["score"]) is float
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return False


def summary(result: dict[str, Any], directory: Path, plugins: Sequence[str] = ()) -> str:
    """What a person wants to know at the end of a run, and what to type next.

    Args:
        plugins: the modules of the run, which the next command needs as well.
    """
    own = shlex.quote(f"+plugins=[{','.join(plugins)}]") + " " if plugins else ""
    test, best = result["test"], result["best"]
    ensemble = [result["ensemble"]] if "ensemble" in result else []
    name = test["score"]
    best_score = f"{format_score(name, best['score'])} ± {format_score(name, best['ci95'])}"
    memory = result["peak_memory_gib"]
    more = "" if "classes" in test else " episodes=1000"
    trained = f"{result['steps']} meta-steps on {result['device']}, "
    trained += f"{result['train_seconds']:.0f} s of training, "
    if not test.get("meta_learned", True):
        trained = f"nothing meta-learned, on {result['device']}, "
    return "\n".join(
        [
            "",
            f"{test['algo']} on {test['data']}, seed {test['seed']}: {trained}"
            f"{result['test_seconds']:.0f} s of test, peak memory {memory:.2f} GiB",
            f"  best validation {name} {best_score}, at meta-step {best['step']}",
            f"  {line(test, 'test')}",
            *(f"  {further}" for further in [*per_source(test), *per_inner_step(test)]),
            *(f"  {line(together, 'test')}" for together in ensemble),
            *counted(result.get("parameters")),
            f"  run directory {directory}",
            f"next: metarun eval {own}{as_argument('ckpt', directory)}{more}",
            f"      tensorboard --logdir {shlex.quote(as_path(directory.parent))}",
        ]
    )


def counted(parameters: dict[str, Any] | None) -> list[str]:
    """The line of a summary on how many parameters there are; none for an older result."""
    if parameters is None:
        return []
    adapted = parameters["adapted"]
    inner = "" if adapted is None else f", {adapted:,} adapted in the inner loop"
    frozen = f"{parameters['frozen']:,}" if parameters["frozen"] else "none"
    hyper = parameters.get("hyperparameters", 0)  # an older result has no number of them
    also = f"; {hyper:,} hyperparameter{'s' * (hyper != 1)} learned" if hyper else ""
    learned = f"{parameters['learned']:,}" if parameters["learned"] else "none"
    return [f"  parameters: {learned} learned{inner}, {frozen} frozen{also}"]


def device_name(device: torch.device) -> str:
    """A device as people name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads != 1)})"


def forget_peak_memory(device: torch.device) -> None:
    """Measure the peak anew: this process may have had other runs of a sweep before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:  # Linux's way; elsewhere the peak stays that of the process
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the GPU's tensors, or of the process on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not ru_maxrss where there is another way: Linux hands a new program the peak of the process
    # that started it (a launcher with gigabytes, say), and that part cannot be forgotten.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
