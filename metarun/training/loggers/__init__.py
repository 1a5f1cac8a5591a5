"""Where a run's figures go besides `metrics.jsonl`: TensorBoard, Weights & Biases."""

from metarun.training.loggers.base import Logged, Logger
from metarun.training.loggers.tensorboard import TensorBoard
from metarun.training.loggers.wandb import Wandb, require_wandb

__all__ = ["Logged", "Logger", "open_loggers", "require_wandb"]


def open_loggers(run: Logged) -> list[Logger]:
    """The loggers that a run's settings ask for, opened.

    Raises:
        RunError: Weights & Biases does not start.
    """
    mode, project = run.settings["trainer.wandb"], run.settings["trainer.wandb_project"]
    loggers: list[Logger] = [Wandb(run, mode, project)] if mode != "off" else []
    return [*loggers, TensorBoard(run)]
