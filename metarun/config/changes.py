"""What is changed of a checkpoint's config: by a command line, or where the data have moved."""

import os
from dataclasses import asdict, fields, replace
from typing import Any

from metarun.config.catalogue import is_in_shared_root, schemas
from metarun.config.checks import read
from metarun.config.run import EVEN, NEUTRAL_KEYS, TrainConfig, flat, redrawn
from metarun.config.trained import EvalConfig, EvalData
from metarun.config.typed import check_data
from metarun.errors import ConfigError, did_you_mean

FORMATS = ("engine.precision", "engine.inner_precision")
"""Of the engine's settings those that can change a figure by more than rounding."""

WHERE = ("root", "download")  # the settings of `EvalData` that are the data set's own


def is_other_domain(stored: TrainConfig, config: EvalConfig) -> bool:
    """Whether another data set is asked for than that of the run."""
    return config.data.name is not None and config.data.name != stored.data.name


def changed(stored: TrainConfig, config: EvalConfig) -> TrainConfig:
    """The checkpoint's config with what the command line changes.

    Raises:
        ConfigError: there is no such setting, or it is of training alone.
    """
    wants, has = config.backbone.norm, vars(stored.backbone).get("norm")
    if wants == "running" and has not in (None, "running"):
        raise ConfigError(
            f"backbone.norm=running: the run was trained with backbone.norm={has}, which keeps no "
            "moving averages: train one with backbone.norm=running"
        )
    parts: dict[str, Any] = {}
    if is_other_domain(stored, config):
        parts["data"] = _other_data(config)
    else:
        for name in ("fit", "invert"):
            if getattr(config.data, name):
                raise ConfigError(
                    f"data.{name}: it is for the data of another domain, given as data=…"
                )
        config = replace(config, data=_same_data(stored, config))
    for part in ("task", "algo", "backbone", "engine", "data", "inner_opt"):
        if part in parts:
            continue
        wanted = vars(getattr(config, part)) if hasattr(config, part) else {}
        given = {key: value for key, value in wanted.items() if value is not None}
        if part == "data":
            given = {key: given[key] for key in WHERE if key in given}
        own = getattr(stored, part)
        if part == "task" and "data" in parts:
            # A data set with fixed tasks has one shape; others are evaluated in that of the run.
            fixed = getattr(parts["data"], "fixed_task", {})
            own = replace(own, **(EVEN | fixed)) if fixed else own
        if part == "task":
            given = redrawn(given, own)
        if part == "engine":
            _refuse_other_weights(own.precision, given.get("precision"))
            if "precision" in given:  # what is typed holds for inner loops, too
                given["inner_precision"] = None
        given = _checked(part, own, given | config.more.get(part, {}))
        parts[part] = read(part, type(own), vars(own) | given)
    if config.seed is not None:
        parts["seed"] = config.seed
    return replace(stored, device=config.device, **parts)


def _refuse_other_weights(own: str, wanted: str | None) -> None:
    """Refuse another format for weights that are in float64."""
    if own == "float64" and wanted is not None:
        raise ConfigError(
            f"engine.precision={wanted}: the weights of the run are in float64, and are evaluated "
            "in it; leave it out"
        )


def _same_data(stored: TrainConfig, config: EvalConfig) -> EvalData:
    """Where the run's own data are now."""
    if config.data.root is not None or not hasattr(stored.data, "root"):
        return config.data
    # Of a plugin's data, and of a folder that is one data set, the folder is what the run was
    # given, whatever the environment says.
    root, download = shared_root(stored.data.name), config.data.download
    if root is None and stored.data.root is not None and hasattr(stored.data, "download"):
        # A checkpoint may say where to read, but only the command line where to write.
        download = bool(download)
    return replace(config.data, root=root, download=download)


def _other_data(config: EvalConfig) -> Any:
    """The settings of another data set: its defaults, and what was typed."""
    name = config.data.name
    assert name is not None
    check_data(name)
    schema = schemas("data")[name]
    given = {key: getattr(config.data, key) for key in WHERE}
    given = {key: value for key, value in given.items() if value is not None}
    if "root" in {field.name for field in fields(schema)}:
        given = {"root": shared_root(name)} | given
    given = _checked("data", schema(), given | config.more.get("data", {}))
    return read("data", schema, {"name": name} | given)


def shared_root(name: str) -> str | None:
    """The folder of all data sets, if a data set is in it."""
    return os.environ.get("METARUN_DATA") if is_in_shared_root(name) else None


def _checked(part: str, own: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Settings to change in a part of a checkpoint's config.

    Raises:
        ConfigError: the part has no such setting, or it is of training alone.
    """
    for key in given:
        if key not in vars(own) or key == "name":
            hint = did_you_mean(key, [k for k in vars(own) if k != "name"], prefix=f"{part}.")
            raise ConfigError(f"{part}.{key}: {part}={own.name} has no such setting{hint}")
        if part == "inner_opt" and key in ("learn", "granularity", "groups", "precondition"):
            raise ConfigError(f"{part}.{key}: it is of training alone")
        if part == "inner_opt" and key in own.learn:
            raise ConfigError(f"{part}.{key}: the run has learned it")
        if key in getattr(own, "of_run", ()):
            raise ConfigError(
                f"{part}.{key}: it says which examples the run has learned from, and no evaluation "
                "may have another value; leave it out"
            )
        if key in getattr(own, "of_training", ()):
            raise ConfigError(f"{part}.{key}: it is of training alone, and changes no evaluation")
    return given


def otherwise(trained: TrainConfig, config: TrainConfig) -> dict[str, Any]:
    """The settings that are not those of the run: what of them can change a figure.

    Of another data set they are those that are not at its defaults.
    """
    before, here = flat(asdict(trained)), flat(asdict(config))
    other: dict[str, Any] = {}
    if config.data.name != trained.data.name:
        before = {key: value for key, value in before.items() if not key.startswith("data.")}
        before |= {f"data.{key}": value for key, value in flat(asdict(type(config.data)())).items()}
        other = {"data": config.data.name}
    return other | {
        key: value
        for key, value in here.items()
        if value != before[key]
        and key != "device"
        and (not key.startswith("engine.") or key in FORMATS)
        and key not in NEUTRAL_KEYS
    }
