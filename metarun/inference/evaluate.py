"""One evaluation of a checkpoint: from what is asked to figures, files and words."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metarun.components.data.split_by_class import ALL_IN_THE_TEST
from metarun.components.formats import without_gpu
from metarun.config.changes import changed, is_other_domain, otherwise
from metarun.config.run import TaskConfig, TrainConfig
from metarun.config.trained import EvalConfig
from metarun.errors import CheckpointError, ConfigError
from metarun.inference import assignment, calibrated, confusion
from metarun.inference.confusion_matrix import write_matrix
from metarun.inference.diagram import write_diagram
from metarun.inference.outcomes import drawn_source_of, each_task, source_of
from metarun.inference.trained import Trained
from metarun.rundir import SWEEP_FILE, checkpoint, top
from metarun.system.files import write_json, write_text
from metarun.system.interrupts import Interruption
from metarun.system.ranks import ALONE, Ranks
from metarun.training import result as results
from metarun.training.data_check import check_evaluated
from metarun.training.device import choose_device
from metarun.training.domain import KEY as EXAMPLES
from metarun.training.domain import Domain, episodes_of, is_too_small
from metarun.training.ensemble import ensemble_trace
from metarun.training.evaluation import evaluate_split
from metarun.training.inert import without_effect
from metarun.training.programs import Traces
from metarun.training.seen_classes import by_weights
from metarun.training.setup import Setup, build, from_plain
from metarun.training.state import restore_meta
from metarun.unroll import Meta

log = logging.getLogger(__name__)

Draw = Callable[[Path], None]
"""Writes a file of its own into the directory of the results."""


class Opened(NamedTuple):
    """What is evaluated.

    Attributes:
        path: the checkpoint, or the folder of several.
        contents: of each checkpoint.
        best: their validations, where there are several.
        setup: the run with what the command changes.
        trained_on: the shape of its training tasks.
        metas: the meta-parameters of each.
        trace: evaluates a batch of tasks.
        tasks: how many.
        other: the settings that are not those of the run.
        unused: those of them that change nothing, in words.
        remark: what the figures say of data that are not those of the run.
    """

    path: Path
    contents: list[dict[str, Any]]
    best: list[dict[str, Any]]
    setup: Setup
    trained_on: TaskConfig
    metas: list[Meta]
    trace: Traces
    tasks: int
    other: dict[str, Any]
    unused: list[str]
    remark: dict[str, Any]


def evaluate_checkpoint(
    config: EvalConfig, directory: Path, ranks: Ranks, stop: Interruption
) -> tuple[float, list[str]]:
    """Evaluate, and write the figures to `directory`.

    Args:
        config: what is asked.
        directory: for `result.json` and pictures; it may hold no other results.
        ranks: the processes that evaluate together.
        stop: ends the evaluation where nothing is half done.

    Returns:
        The score, and what a person reads.

    Raises:
        ConfigError: the checkpoint cannot be evaluated so.
        CheckpointError: it is damaged.
        DataError: the data are missing or damaged.
    """
    opened = _open(config, directory, ranks)
    _tell(opened)
    setup, split = opened.setup, config.split
    with stop.deferred():
        evaluation = evaluate_split(
            setup,
            opened.trace,
            opened.metas[0],
            split,
            opened.tasks,
            lambda done: stop.check(),
        )
    figures = results.describe(setup, evaluation, split, opened.best, opened.trained_on)
    figures |= opened.remark
    tasks = evaluation.scores.shape[0]
    with stop.deferred():
        more, pictures, words = _look_closer(config, opened, tasks, lambda done: stop.check())
    figures |= more
    stored = directory / "result.json"
    if ranks.first:
        for draw in pictures:
            draw(directory)
        of_checkpoint = {
            "ckpt": str(opened.path),
            "step": opened.contents[0]["step"],
            "changed": opened.other,
        }
        write_json(stored, of_checkpoint | {split: figures})
    told = [results.line(figures, split), *results.per_source(figures)]
    told += [*results.per_inner_step(figures), *words]
    if figures.get("task_set"):
        told.append(f"the first {tasks:,} of {figures['task_set']}")
    return evaluation.score, [*told, f"written to {stored}"]


def _open(config: EvalConfig, directory: Path, ranks: Ranks) -> Opened:
    path, best, contents = Path(config.ckpt), list[dict[str, Any]](), list[dict[str, Any]]()
    with ranks.together():
        if ranks.first:
            _refuse_used(directory)
            path, best, contents = _read(config)
        device = choose_device(config.device, ranks)
    best, contents = ranks.broadcast_from_first((best, contents))
    content = contents[0]
    with ranks.together():
        trained = from_plain(content["config"])
        asked = without_gpu(trained, changed(trained, config), device)
        # A calibration takes tasks of validation too.
        split = None if config.calibrate else config.split
        domain = _domain(config, trained, content, split)
        setup = build_evaluated(asked, device, content, split, ranks, domain)
        _refuse_impossible(config, trained, setup)
        tasks = episodes_of(asked.data.name, setup.source, config.split, config.episodes)
        other = otherwise(trained, asked) | _of_fitting(config)
        told = without_effect(asked, setup.source.kind, setup.source.outputs, setup.source)
        unused = [text for text in told if text.partition("=")[0] in other]
        for key in (text.partition("=")[0] for text in unused):
            if key.startswith("data."):  # the data are the same, so nothing is otherwise
                del other[key]
        remark = check_evaluated(setup, content, trained, config)
        remark |= by_weights(setup, config.split)
        metas: list[Meta] = [_restored(setup, each, other) for each in contents]
        trace = setup.trace if not best else ensemble_trace(setup, contents, metas)
    tasks = tasks or default_tasks(asked, config.split)
    trained_on = trained.task.in_training()
    return Opened(
        path, contents, best, setup, trained_on, metas, trace, tasks, other, unused, remark
    )


def _refuse_used(directory: Path) -> None:
    """Refuse a directory that holds something else.

    Raises:
        ConfigError: says what.
    """
    if (directory / "result.json").exists() or (directory / "config.yaml").exists():
        raise ConfigError(f"{directory} holds results already: choose another hydra.run.dir")
    if (directory / SWEEP_FILE).exists():
        raise ConfigError(f"{directory} is the directory of a sweep: choose another hydra.run.dir")


def _read(config: EvalConfig) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """The checkpoint, or the folder of several, their validations, and what each holds."""
    path = Path(config.ckpt)
    if config.ensemble is None:
        path = checkpoint.find(path)
        return path, [], [checkpoint.load(path)]
    path, best = top.best_validations(path, config.ensemble)
    return path, best, top.load_each(path, best)


def _domain(
    config: EvalConfig, trained: TrainConfig, content: dict[str, Any], split: str | None
) -> Domain | None:
    whole = config.more.get("data", {}).get("fractions") == ALL_IN_THE_TEST
    if not is_other_domain(trained, config) and not whole:
        return None
    return Domain(
        trained.data.name,
        content.get(EXAMPLES),
        bool(config.data.fit),
        bool(config.data.invert),
        split,
    )


def build_evaluated(
    config: TrainConfig,
    device: torch.device,
    content: dict[str, Any],
    split: str | None,
    ranks: Ranks = ALONE,
    domain: Domain | None = None,
) -> Setup:
    """The setup of a run that is evaluated; other splits may be too small for the tasks.

    Args:
        config: the run's, with what is changed of it.
        device: where it is computed.
        content: of its checkpoint.
        split: which is evaluated; None: several are.
        ranks: the processes that evaluate together.
        domain: of data that nothing is trained on; None: those of the run.

    Raises:
        ConfigError: the run cannot be evaluated so.
        DataError: the data are missing or damaged.
    """
    planned, trained = content["planned_for"], content["config"]
    seed = trained["seed"]
    try:
        return build(config, device, ranks, planned, trained_with=seed, domain=domain)
    except ConfigError as error:
        if domain is not None or split is None or not is_too_small(error):
            raise
        own = Domain(trained["data"]["name"], content.get(EXAMPLES), split=split)
        return build(config, device, ranks, planned, trained_with=seed, domain=own)


def _refuse_impossible(config: EvalConfig, trained: TrainConfig, setup: Setup) -> None:
    """Refuse what the run, or its data, cannot do.

    Raises:
        ConfigError: names the setting.
    """
    if setup.source.kind != "classification" and config.task.way is not None:
        raise ConfigError(
            f"task.way={config.task.way}: these tasks are {setup.source.kind}, which has "
            "no classes: leave task.way out"
        )
    way = setup.config.task.way
    if not setup.algorithm.any_way and way != trained.task.way:
        raise ConfigError(
            f"task.way={way}: the checkpoint's network tells {trained.task.way} classes apart; "
            "train one with that task.way, or with an algorithm without a head of its own, such "
            "as protonet or r2d2"
        )
    if setup.algorithm.one_model is not None:
        for key in ("episodes", "seed"):
            if (value := getattr(config, key)) is not None:
                raise ConfigError(
                    f"{key}={value}: the run trained one model, which is evaluated on all examples "
                    f"of split={config.split}, and none are drawn; leave it out"
                )
    if config.calibrate:
        calibrated.refuse_calibration(setup, config.split)
    if config.confusion:
        drawn_source_of(setup, "confusion=true")
    if config.assign:
        source_of(setup, "assign=true")


def _restored(setup: Setup, content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The meta-parameters of a checkpoint.

    Raises:
        ConfigError: they do not fit what was changed.
    """
    try:
        return restore_meta(setup, content)
    except CheckpointError as error:
        if shape := [key for key in other if not key.startswith(("task.", "seed"))]:
            raise ConfigError(
                f"{', '.join(shape)}: what the run has learned does not fit it, so it is of "
                f"training alone ({error})"
            ) from error
        raise


def _tell(opened: Opened) -> None:
    """Log what is evaluated, and what is not as in training."""
    steps = ", ".join(str(each["step"]) for each in opened.contents)
    log.info("%s, after meta-step %s", opened.path, steps)
    if opened.other:
        log.info(
            "otherwise than in training: %s",
            ", ".join(f"{key}={value}" for key, value in opened.other.items()),
        )
    if opened.unused:
        log.warning("without effect: %s", "; ".join(opened.unused))


def _look_closer(
    config: EvalConfig, opened: Opened, tasks: int, on_progress: Callable[[int], None]
) -> tuple[dict[str, Any], list[Draw], list[str]]:
    """What is asked for beside the score: figures, files and words."""
    loaded = Trained(
        opened.path, opened.contents[0]["step"], opened.setup, dict(opened.metas[0]), None
    )
    figures, draws, words = dict[str, Any](), list[Draw](), list[str]()
    if config.assign or config.confusion:
        source = source_of(opened.setup)
        found = list(each_task(loaded, source, config.split, tasks, on_progress))
    if config.assign:
        figures["assigned"] = assignment.assigned_figures(source.query, found)
        words.append(assignment.line(figures["assigned"]))
    if config.confusion:
        counted = confusion.count_confusion(source, config.split, found)
        figures["confusion"] = confusion.plain(counted)
        draws += [
            lambda folder: write_text(folder / "confusion.csv", confusion.as_table(counted)),
            lambda folder: write_matrix(folder / "confusion.png", counted),
        ]
        words += confusion.lines(figures["confusion"], tasks)
    if config.calibrate:
        own = calibrated.calibrated_figures(
            loaded,
            config.split,
            tasks,
            config.coverage,
            config.false_alarms,
            on_progress=on_progress,
        )
        figures["calibration"] = own
        draws.append(lambda folder: write_diagram(folder / "reliability.png", own))
        words += calibrated.lines(own, config.split)
    return figures, draws, words


def _of_fitting(config: EvalConfig) -> dict[str, Any]:
    """What is done to the images of another domain."""
    given = {"data.fit": config.data.fit, "data.invert": config.data.invert}
    return {key: value for key, value in given.items() if value}


def default_tasks(config: TrainConfig, split: str) -> int:
    """As many tasks as the training run took of that split to score itself."""
    return config.trainer.eval_episodes if split == "val" else config.trainer.test_episodes
