"""Refusing to go on with other data than a run has seen, wherever its folder is."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metarun.components.build import build_data
from metarun.components.data.lake import has_seen
from metarun.config.run import TrainConfig
from metarun.config.trained import EvalConfig
from metarun.episodes.identity import brief_identity, identity_of, is_sampled, same_data
from metarun.errors import ConfigError
from metarun.rundir import directory as rundir
from metarun.training.seen_classes import (
    IN_TRAINING,
    among_sources,
    by_training,
    own_name,
    shared_by_sources,
)
from metarun.training.setup import Setup, to_plain

log = logging.getLogger(__name__)

KEY = "data_identity"
"""Of checkpoints and of the figures in result.json."""

SOURCES = "training_sources"
"""Of the figures: the data sets of the run's `data=multi`, where they are of other data."""


def check_ranks(setup: Setup) -> None:
    """Refuse ranks that read different data.

    Raises:
        ConfigError: names the rank and the folders.
    """
    for rank, (identity, root) in enumerate(setup.ranks.gather((setup.identity, _root(setup)))):
        if not same_data(identity, setup.identity):
            raise ConfigError(
                f"rank {rank} reads other data than rank {setup.ranks.rank} "
                f"({_what(identity, root)} and {_what(setup.identity, _root(setup))}): all "
                "processes of a run need the same"
            )


def check_resumed(setup: Setup, content: dict[str, Any], directory: Path) -> None:
    """Refuse to resume a run on other data.

    Raises:
        ConfigError: says what was there and what is here.
    """
    stored, root = content.get(KEY), content["config"]["data"].get("root")
    if stored is None:
        log.info("the checkpoint does not say which data it has seen: they are not compared")
    elif not same_data(stored, setup.identity):
        raise _other(directory, stored, root, setup.identity, _root(setup))


def check_recalled(config: TrainConfig, directory: Path, result: dict[str, Any]) -> None:
    """Refuse to recall a finished run that is asked for with a folder of other data.

    Raises:
        ConfigError: as `check_resumed`.
    """
    stored = result["test"].get(KEY)
    if stored is None or not rundir.reads_elsewhere(directory, to_plain(config)):
        return
    here = identity_of(build_data(config, torch.device("cpu")))
    if not same_data(stored, here):
        root = rundir.stored_config(directory)["data"].get("root")
        raise _other(directory, stored, root, here, getattr(config.data, "root", None))


def check_evaluated(
    setup: Setup, content: dict[str, Any], stored: TrainConfig, asked: EvalConfig
) -> dict[str, Any]:
    """Refuse to evaluate on other data than those of training, unless they are asked for.

    Args:
        stored: the checkpoint's config.
        asked: the command's; `data.root` or `data=…` in it asks for other data.

    Returns:
        What the figures say of it: `other_data`, if they are from other data; `training_data`,
        the name of the run's, if it is another data set, and `training_sources`, if it was
        several; and what `metarun.training.seen_classes` finds.

    Raises:
        ConfigError: says what was there and what is here.
    """
    before, here = content.get(KEY), setup.identity
    if setup.config.data.name != stored.data.name:
        found = {"other_data": True, "training_data": stored.data.name, "training_" + KEY: before}
        if stored.data.name == "multi":
            found[SOURCES] = sorted({source["name"] for source in stored.data.sources})
        if setup.config.data.name == "lake" and has_seen(stored.data):
            log.warning(
                "the run was trained on characters of these alphabets: this is not Lake's "
                "protocol, for which train with data.split=background"
            )
            found[IN_TRAINING] = True  # how many there are, its data tell if they are here
        return found | _of_other_data(setup, stored, before, asked)
    if before is None:
        log.info("the checkpoint does not say which data it has seen: they are not compared")
        return {}
    config = setup.config
    if is_sampled(here) and (config.task, config.seed) != (stored.task, stored.seed):
        same = replace(config, task=stored.task, seed=stored.seed)
        here = identity_of(build_data(same, setup.device))
    if same_data(before, here):
        return among_sources(setup.source, asked.split, own=own_name(stored.data))
    root, now = getattr(stored.data, "root", None), _root(setup)
    if asked.data.root is not None or asked.more.get("data"):
        log.warning(
            "these are other data than in training: %s then, %s now",
            _what(before, root), _what(here, now),
        )  # fmt: skip
        found = {"other_data": True, "training_" + KEY: before}
        return found | _of_other_data(setup, stored, before, asked)
    if now is None:
        remedy = "bring back the data, or the plugin, that it was trained with"
    else:
        remedy = (
            "give data.root=… with the folder of its data; with this folder, data.root="
            f"{now}, they are evaluated on all the same, and the result says so"
        )
    env = os.environ.get("METARUN_DATA")
    why = " (METARUN_DATA)" if now is not None and env is not None and root != now else ""
    raise ConfigError(
        f"the checkpoint was trained on other data: {_what(before, root)} then, "
        f"{_what(here, now)}{why} now; {remedy}"
    )


def data_words(figures: dict[str, Any]) -> str:
    """What a result line says of data that are not those of training; empty: they are."""
    trained = figures.get("training_data")
    if trained is None:
        return ", other data than in training" if figures.get("other_data") else ""
    seen = figures.get(IN_TRAINING)
    what = "other data than" if isinstance(seen, dict) else "another domain than"
    if figures["data"] in figures.get(SOURCES, ()):
        what = "one of several"
    known = " on characters of these alphabets" if seen is True else ""
    return f", data {figures['data']}: {what} in training ({trained}{known})"


def _of_other_data(
    setup: Setup, stored: TrainConfig, before: str | None, asked: EvalConfig
) -> dict[str, Any]:
    shared = shared_by_sources(setup.source, asked.split)
    return shared | by_training(setup, stored, before, asked)


def _other(
    directory: Path, stored: str, root: str | None, here: str, now: str | None
) -> ConfigError:
    remedy = "bring back its data"
    if now is not None:
        remedy = "give data.root=… with the folder of its data"
    return ConfigError(
        f"{directory} holds a run on other data: {_what(stored, root)} then, {_what(here, now)} "
        f"now; nothing was changed; {remedy}, or choose another hydra.run.dir"
    )


def _root(setup: Setup) -> str | None:
    root = getattr(setup.config.data, "root", None)
    return None if root is None else str(root)


def _what(identity: str, root: str | None) -> str:
    content = brief_identity(identity)
    return content if root is None else f"{content} in {root}"
