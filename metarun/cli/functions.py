"""What the commands do, from Python: `metarun.train` and `metarun.evaluate`."""

import datetime
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module

from metarun.cli.main import prepared
from metarun.config import compose
from metarun.errors import ConfigError
from metarun.system.untrusted import json_object

RUN_DIR = "hydra.run.dir="


def train(*settings: str) -> dict[str, Any]:
    """Train a run, as `metarun train` does; it resumes an unfinished one in the same folder.

    Args:
        settings: as on the command line, such as "algo=maml"; "hydra.run.dir=…" names its folder.

    Returns:
        What is in the run's `result.json`, and its folder as "run".

    Raises:
        ConfigError: the settings are wrong.
        RunError: the run could not go on.

    Example:
        >>> import metarun
        >>> result = metarun.train(
        ...     "algo=protonet", "data=glyphs", "backbone.width=4", "trainer.steps=2",
        ...     "trainer.eval_episodes=2", "trainer.test_episodes=2",
        ... )  # doctest: +ELLIPSIS
        <BLANKLINE>
        protonet on glyphs, seed 0: 2 meta-steps on ...
        >>> 0 <= result["test"]["accuracy"] <= 1
        True
    """
    from metarun.system.random_state import random_state_kept
    from metarun.training.run import run

    config, folder = _config("train", settings)
    with _told(), random_state_kept():
        run(config, folder)
    return json_object(folder / "result.json") | {"run": str(folder)}


def evaluate(run: str | os.PathLike[str], *settings: str) -> dict[str, Any]:
    """Evaluate a run on fresh tasks, as `metarun eval` does.

    Args:
        run: a run directory (its best checkpoint) or a checkpoint file.
        settings: as on the command line, such as "episodes=1000".

    Returns:
        The figures: "accuracy" or "mse", "ci95" and the protocol they were measured under. The
        folder that they are written to is "run".

    Raises:
        ConfigError: the settings are wrong.
        RunError: the evaluation could not go on.

    Example:
        >>> import metarun
        >>> run = "outputs/train/mine"
        >>> figures = metarun.evaluate(run, "task.shot=5", "episodes=20")  # doctest: +ELLIPSIS
        test accuracy ...
        >>> 0 <= figures["accuracy"] <= 1, figures["ci95"] > 0
        (True, True)
    """
    from metarun.cli.eval import run as run_eval
    from metarun.system.random_state import random_state_kept

    config, folder = _config("eval", (f"ckpt={os.fspath(run)}", *settings))
    with _told(), random_state_kept():
        run_eval(config, folder)
    figures: dict[str, Any] = json_object(folder / "result.json")[config.split]
    return figures | {"run": str(folder)}


def _config(command: str, settings: tuple[str, ...]) -> tuple[Any, Path]:
    """The config of settings, and the folder of the run."""
    for setting in settings:
        if not isinstance(setting, str):
            raise ConfigError(
                f'{setting!r} is no setting: give each as a text, such as "seed=1"; a list of '
                "them needs a star before it"
            )
    if options := [setting for setting in settings if setting.startswith("-")]:
        raise ConfigError(f"{options[0]} is for the command line: give settings, key=value")
    if nameless := [setting for setting in settings if not setting.partition("=")[0].strip()]:
        raise ConfigError(f"{nameless[0]!r} names no setting: give key=value")
    given = [setting for setting in settings if setting.startswith(RUN_DIR)]
    if given and given[-1] == RUN_DIR:
        raise ConfigError(f"{RUN_DIR} is empty: name a folder, . for the current one")
    moment = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    folder = Path("outputs") / command / moment
    if given:
        folder = Path(os.path.expanduser(given[-1].removeprefix(RUN_DIR)))
    arguments = prepared(command, [setting for setting in settings if setting not in given])
    compose.refuse_signs(command, arguments)
    try:
        with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
            return compose.to_config(hydra_compose(command, arguments)), folder
    except compose.COMPOSITION_ERRORS as error:
        raise compose.explain(error, command, arguments) from error


@contextmanager
def _told() -> Iterator[None]:
    """Show what a command says of its progress, unless the caller has settled that already."""
    log, shown = logging.getLogger("metarun"), logging.StreamHandler(sys.stderr)
    if log.hasHandlers():
        yield
        return
    before = log.level
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.setLevel(before)
