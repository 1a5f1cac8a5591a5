"""`metarun eval`."""

import logging
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config.changes import changed, is_other_domain, otherwise
from metarun.config.run import TrainConfig
from metarun.config.trained import EvalConfig
from metarun.errors import ConfigError
from metarun.rundir import SWEEP_FILE
from metarun.sweeps.job import job

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="eval")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once for each job of a sweep."""
    return job(run)(cfg)


def run(config: EvalConfig, directory: str | Path) -> float:
    """Evaluate a checkpoint, print the figures and write them to `result.json`.

    Returns:
        The score.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.inference import confusion
    from metarun.inference.calibrated import calibrated_figures, lines, refuse_calibration
    from metarun.inference.confusion_matrix import write_matrix
    from metarun.inference.diagram import write_diagram
    from metarun.inference.trained import Trained
    from metarun.rundir import checkpoint, top
    from metarun.system.files import write_json, write_text
    from metarun.system.interrupts import Interruption
    from metarun.system.lifetime import collect_from_here
    from metarun.system.ranks import join
    from metarun.training import result as results
    from metarun.training.data_check import check_evaluated
    from metarun.training.device import choose_device
    from metarun.training.domain import KEY as EXAMPLES
    from metarun.training.domain import Domain, episodes_of
    from metarun.training.ensemble import ensemble_trace
    from metarun.training.evaluation import evaluate_split
    from metarun.training.inert import without_effect
    from metarun.training.setup import build, from_plain

    collect_from_here()
    ranks = join()
    directory = Path(ranks.broadcast_from_first(directory))
    path, contents = Path(config.ckpt), list[dict[str, Any]]()
    best = list[dict[str, Any]]()
    stored = directory / "result.json"
    agree = ranks.largest if ranks.count > 1 else None
    with Interruption(agree) as stop:
        with ranks.together():
            if ranks.first:
                if stored.exists() or (directory / "config.yaml").exists():
                    raise ConfigError(
                        f"{directory} holds results already: choose another hydra.run.dir"
                    )
                if (directory / SWEEP_FILE).exists():
                    raise ConfigError(
                        f"{directory} is the directory of a sweep: choose another hydra.run.dir"
                    )
                if config.ensemble is None:
                    path = checkpoint.find(path)
                    contents = [checkpoint.load(path)]
                else:
                    path, best = top.best_validations(path, config.ensemble)
                    contents = top.load_each(path, best)
            device = choose_device(config.device, ranks)
        best, contents = ranks.broadcast_from_first((best, contents))
        content = contents[0]
        with ranks.together():
            trained = from_plain(content["config"])
            train_config = changed(trained, config)
            domain = None
            if is_other_domain(trained, config):
                domain = Domain(
                    trained.data.name,
                    content.get(EXAMPLES),
                    bool(config.data.fit),
                    bool(config.data.invert),
                )
            setup = build(
                train_config,
                device,
                ranks,
                content["planned_for"],
                trained_with=trained.seed,
                domain=domain,
            )
            if setup.source.kind != "classification" and config.task.way is not None:
                raise ConfigError(
                    f"task.way={config.task.way}: these tasks are {setup.source.kind}, which has "
                    "no classes: leave task.way out"
                )
            if not setup.algorithm.any_way and train_config.task.way != trained.task.way:
                raise ConfigError(
                    f"task.way={train_config.task.way}: the checkpoint's network tells "
                    f"{trained.task.way} classes apart; train one with that task.way, or with an "
                    "algorithm without a head of its own, such as protonet or r2d2"
                )
            if setup.algorithm.one_model is not None:
                _refuse_draws(config)
            if config.calibrate:
                refuse_calibration(setup, config.split)
            if config.confusion:
                confusion.refuse_confusion(setup)
            name = train_config.data.name
            episodes = episodes_of(name, setup.source, config.split, config.episodes)
            other = otherwise(trained, train_config) | _of_fitting(config)
            remark = check_evaluated(setup, content, trained, config)
            metas = [_restored(setup, each, other) for each in contents]
            trace = setup.trace if not best else ensemble_trace(setup, contents, metas)
        steps = ", ".join(str(each["step"]) for each in contents)
        log.info("%s, after meta-step %s", path, steps)
        if other:
            shown = ", ".join(f"{key}={value}" for key, value in other.items())
            log.info("otherwise than in training: %s", shown)
            told = without_effect(train_config, setup.source.kind, setup.source.outputs)
            if unused := [text for text in told if text.partition("=")[0] in other]:
                log.warning("without effect: %s", "; ".join(unused))
        with stop.deferred():
            evaluation = evaluate_split(
                setup,
                trace,
                metas[0],
                config.split,
                episodes or default_episodes(train_config, config.split),
                lambda done: stop.check(),
            )
        figures = results.describe(setup, evaluation, config.split, best) | remark
        loaded = Trained(path, contents[0]["step"], setup, metas[0], None)
        if config.confusion:
            with stop.deferred():
                confused = confusion.count_confusion(
                    loaded, config.split, evaluation.scores.shape[0], lambda done: stop.check()
                )
            figures["confusion"] = confusion.plain(confused)
        if config.calibrate:
            with stop.deferred():
                figures["calibration"] = calibrated_figures(
                    loaded,
                    config.split,
                    evaluation.scores.shape[0],
                    config.coverage,
                    config.false_alarms,
                    on_progress=lambda done: stop.check(),
                )
        if ranks.first:
            of_checkpoint = {"ckpt": str(path), "step": content["step"], "changed": other}
            if config.calibrate:
                write_diagram(directory / "reliability.png", figures["calibration"])
            if config.confusion:
                write_text(directory / "confusion.csv", confusion.as_table(confused))
                write_matrix(directory / "confusion.png", confused)
            write_json(stored, of_checkpoint | {config.split: figures})
    print(results.line(figures, config.split))
    for further in [*results.per_source(figures), *results.per_inner_step(figures)]:
        print(further)
    if config.confusion:
        for further in confusion.lines(figures["confusion"], evaluation.scores.shape[0]):
            print(further)
    for further in lines(figures["calibration"], config.split) if config.calibrate else ():
        print(further)
    if figures.get("task_set"):
        print(f"the first {figures['episodes']:,} of {figures['task_set']}")
    print(f"written to {stored}")
    return evaluation.score


def _refuse_draws(config: EvalConfig) -> None:
    """Refuse what says which tasks are drawn, where a model meets examples.

    Raises:
        ConfigError: names the setting.
    """
    for key in ("episodes", "seed"):
        if (value := getattr(config, key)) is not None:
            raise ConfigError(
                f"{key}={value}: the run trained one model, which is evaluated on all examples of "
                f"split={config.split}, and none are drawn; leave it out"
            )


def _restored(setup: Any, content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The meta-parameters of a checkpoint.

    Raises:
        ConfigError: they do not fit what was changed.
    """
    from metarun.errors import CheckpointError
    from metarun.training.state import restore_meta

    try:
        return restore_meta(setup, content)
    except CheckpointError as error:
        if shape := [key for key in other if not key.startswith(("task.", "seed"))]:
            raise ConfigError(
                f"{', '.join(shape)}: what the run has learned does not fit it, so it is of "
                f"training alone ({error})"
            ) from error
        raise


def _of_fitting(config: EvalConfig) -> dict[str, Any]:
    """What is done to the images of another domain."""
    given = {"data.fit": config.data.fit, "data.invert": config.data.invert}
    return {key: value for key, value in given.items() if value}


def default_episodes(config: TrainConfig, split: str) -> int:
    """As many tasks as the training run took of that split to score itself."""
    return config.trainer.eval_episodes if split == "val" else config.trainer.test_episodes
