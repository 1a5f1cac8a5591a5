"""`metarun train`."""

import logging
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config import TrainConfig, flat
from metarun.job import job

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="train")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once for each job of a sweep."""
    return job(run)(cfg)


def run(config: TrainConfig, directory: Path) -> float:
    """Train, test and summarise one run; resume it if it was begun, recall it if it is done.

    Returns:
        The best validation score.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun import checkpoint, results, rundir, training_state
    from metarun.interrupts import Interrupted, Interruption
    from metarun.loggers import Logged, open_loggers, require_wandb
    from metarun.setup import build, choose_device, to_plain
    from metarun.tracking import Tracker
    from metarun.trainer import train

    plain = to_plain(config)
    if (result := rundir.finished_result(directory, plain)) is not None:
        log.info("%s holds this run, finished: nothing to do", directory)
        print(results.summary(result, directory))
        return float(result["best"]["score"])
    require_wandb(config.trainer.wandb)
    with Interruption() as stop:
        device = choose_device(config.device)
        setup = build(config, device)
        with rundir.opened(directory, plain, str(device)):
            folder = directory / "checkpoints"
            content = checkpoint.load_newest(folder)
            if content is None:
                state = training_state.fresh(setup)
            else:
                state = training_state.restore(setup, content)
                log.info("resuming after meta-step %d", state.step)
            log.info("run directory %s, device %s, tasks by %s", directory, device, setup.batching)
            try:
                loggers = open_loggers(Logged(directory, flat(plain), setup.objective.score_name))
                with Tracker(
                    directory, state.step, state.last_eval, config.trainer.steps, loggers
                ) as tracker:
                    train(setup, state, folder, tracker, stop)
                    result = results.finish(setup, state, directory, tracker)
            except Interrupted as interrupted:
                interrupted.args = (
                    f"{interrupted} after meta-step {state.step}; checkpoints are in {folder}",
                )
                raise
    print(results.summary(result, directory))
    return float(result["best"]["score"])
