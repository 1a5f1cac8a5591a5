"""`metarun data`: which data sets are there, making them ready, and looking into them."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metarun.config.catalogue import builder, schemas
from metarun.config.component import finder_of
from metarun.config.run import TrainConfig
from metarun.errors import ConfigError, DataError, did_you_mean, printable_name

USAGE = "metarun data list | check NAME | prepare NAME [data.KEY=VALUE …]"
HELP = f"""\
metarun data: which data sets are there, making them ready, and looking into them

usage: {USAGE}

  list           every data set: what of it is there, what is missing and how to get it
  prepare NAME   fetch what is missing, where that is possible, and convert it
  check NAME     count classes and examples, look for examples and classes that are in two splits,
                 and draw one task; with augment.crop=8 … also one of training, augmented

settings are those of metarun train: data.root=FOLDER, data.size=84, task.way=5 …; check also takes
sheet=FILE, where the picture of the task goes (default: outputs/data/NAME.png)

examples:
  metarun data list
  metarun data prepare omniglot
  metarun data check folder data.root=my_pictures task.shot=5
"""
ACTIONS = ("list", "check", "prepare")
SHOWN = 5  # of the examples of a fault


def main(arguments: Sequence[str]) -> None:
    """Run `metarun data` with the arguments behind the command's name; plugins are imported.

    Raises:
        ConfigError: the arguments are wrong.
        DataError: the data are missing or damaged; or `check` finds what makes figures wrong.
    """
    if "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return
    if not arguments or arguments[0] not in ACTIONS:
        given = f", not {arguments[0]!r}{did_you_mean(arguments[0], ACTIONS)}" if arguments else ""
        raise ConfigError(f"choose one of {', '.join(ACTIONS)}{given}; usage: {USAGE}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    action, *rest = arguments
    if action == "list":
        list_data(rest)
        return
    if not rest or "=" in rest[0]:
        raise ConfigError(f"not given: the data set, e.g. metarun data {action} omniglot")
    name, *settings = rest
    sheet = Path("outputs") / "data" / f"{name}.png"
    for setting in [s for s in settings if s.startswith("sheet=")]:
        settings.remove(setting)
        sheet = Path(os.path.expanduser(setting.removeprefix("sheet=")))
        if sheet.suffix != ".png":
            raise ConfigError(f"{setting}: must end in .png")
    config = configured(name, settings)
    if action == "prepare":
        prepare(config)
    else:
        check(config, sheet)


def configured(name: str, settings: Sequence[str]) -> TrainConfig:
    """The config of a run on a data set.

    Raises:
        ConfigError: there is no such data set, or a setting is wrong.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    from metarun.config import compose
    from metarun.config.typed import with_paths

    if name not in schemas("data"):
        known = schemas("data")
        raise ConfigError(
            f"there is no data set {name!r}{did_you_mean(name, known)}; there are "
            f"{', '.join(known)}"
        )
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"{setting!r} is no setting: write data.KEY=VALUE; usage: {USAGE}")
    compose.register_schemas()
    overrides = [f"data={name}", *with_paths(settings, multirun=False)]
    try:
        with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
            config: TrainConfig = compose.to_config(hydra_compose("train", overrides))
    except compose.COMPOSITION_ERRORS as error:
        raise compose.explain(error, "train", overrides) from error
    return config


def list_data(settings: Sequence[str]) -> None:
    """Print every data set, and what of it is there.

    Raises:
        ConfigError: a setting is wrong.
    """
    from metarun.cli.help import options

    for setting in settings:
        if not setting.startswith(("data.root=", "plugins=")):
            raise ConfigError(f"list takes data.root=<folder of data sets>, not {setting!r}")
    for name, schema in schemas("data").items():
        shared = hasattr(schema, "root") and not getattr(schema, "own_root", False)
        print(f"{name}: {options()['data'][name]}")
        for line in state_of(configured(name, settings if shared else [])).splitlines():
            print(f"    {line}")


def state_of(config: TrainConfig) -> str:
    """What of a data set is there, or what is missing and how to get it."""
    builder("data", config.data.name)  # imports its file
    find = finder_of(type(config.data))
    if find is None:
        return "needs no files"
    try:
        return f"found: {find(config.data)}"
    except ConfigError as error:
        return str(error)
    except DataError as error:
        return f"missing: {error}"


def prepare(config: TrainConfig) -> None:
    """Convert a data set, so that a run finds it ready.

    Raises:
        DataError: it is missing and cannot be fetched, or it is damaged.
    """
    parts = _parts(_built(config, least=True), config.data.name)
    files: set[str] = set()
    for name, part in parts.items():
        if len(parts) > 1:
            print(f"{name}:")
        stores = _stores(part)
        _tell_counts(stores)
        files |= {str(s.origin.file) for s in stores.values() if s.origin is not None}
    print(
        f"data={config.data.name} is ready" + (f", in {', '.join(sorted(files))}" if files else "")
    )


def check(config: TrainConfig, sheet: Path) -> None:
    """Count what a data set has, look for what should not be there, and draw a task.

    Raises:
        DataError: examples or classes are in two splits, or in two data sets of data=multi; or it
            is missing or damaged.
        ConfigError: it has too few classes or examples for such tasks.
    """
    from metarun.training.seen_classes import among_sources

    source = _built(config, least=True)
    parts = _parts(source, config.data.name)
    in_two = []
    for name, part in parts.items():
        if len(parts) > 1:
            print(f"{name}:")
        if not _check_splits(name, part):
            in_two.append(name)
    between = among_sources(source, "test", ["val"])  # warns of what it finds
    if any(map(_stores, parts.values())):
        _draw(_built(config), config, sheet)
        if config.augment.on:
            _draw_augmented(_built(config), config, sheet.with_stem(f"{sheet.stem}-augmented"))
    if in_two:
        raise DataError(
            f"data={' and '.join(in_two)}: what is in two splits is tested after it was trained "
            "on, so figures would be too good"
        )
    if between:
        raise DataError(
            f"data={config.data.name}: its data sets share classes, as said above, so figures "
            "would be too good or their intervals too narrow"
        )


def _check_splits(name: str, source: Any) -> bool:
    """Print what a data set has, and what should not be there; whether its splits are apart."""
    from metarun.episodes.inspection import repeats, shared_classes
    from metarun.episodes.store_file import skipped_names

    stores = _stores(source)
    if not stores:
        print(f"data={name} draws its tasks from no examples: nothing to check")
        return True
    _tell_counts(stores)
    print(f"each example: {'×'.join(map(str, source.input_shape))} numbers")
    skipped = sorted({name for store in stores.values() for name in skipped_names(store)})
    _tell("pictures that cannot be read, and are left out", skipped)
    shared, same = shared_classes(stores), repeats(stores)
    _tell("classes in two splits", [f"{c} ({one}, {other})" for c, one, other in shared])
    _tell("examples in two splits", _pairs(same.across))
    _tell("examples in two classes of a split", _pairs(same.between))
    _tell("examples twice in their class", _pairs(same.within))
    return not shared and not same.across


def _draw(source: Any, config: TrainConfig, sheet: Path) -> None:
    from dataclasses import replace

    if not _has_pictures(source):
        return
    if config.task.uneven is not None:  # a sheet has rows of as many examples
        shot = 1 if config.task.imbalanced else config.task.shot
        config = replace(config, task=replace(config.task.even(), shot=shot))
        source = _built(config)
    _save_sheet(source.sample("test", 0, 1), config.task.way, sheet)
    print(f"the first test task is drawn in {sheet}")


def _draw_augmented(source: Any, config: TrainConfig, sheet: Path) -> None:
    from dataclasses import replace

    import torch

    from metarun.components.build import training_source
    from metarun.components.fits import check_pictures
    from metarun.episodes.augment import AugmentedEpisodes

    trained = config.task.in_training()
    if trained.uneven is not None:
        shot = 1 if trained.imbalanced else trained.shot
        config = replace(config, task=replace(trained.even(), shot=shot))
        source = _built(config)
    drawn = training_source(config, source, torch.device("cpu"))
    check_pictures(config, drawn)
    task = AugmentedEpisodes(drawn, config.augment, config.seed).sample("train", 0, 1)
    _save_sheet(task, config.task.in_training().way, sheet)
    print(f"the first training task, augmented, is drawn in {sheet}")


def _has_pictures(source: Any) -> bool:
    return len(source.input_shape) == 3 and source.input_shape[0] in (1, 3)


def _save_sheet(task: Any, way: int, sheet: Path) -> None:
    from metarun.pictures.sheet import contact_sheet
    from metarun.system.files import make_folder

    make_folder(sheet.parent)
    contact_sheet(task.support_x[0], task.query_x[0], way).save(sheet)


def _built(config: TrainConfig, least: bool = False) -> Any:
    """The source of a config's tasks, or of the smallest ones, which any data have."""
    from dataclasses import replace

    import torch

    from metarun.components.build import build_data
    from metarun.config.run import TaskConfig

    if least:
        config = replace(config, task=TaskConfig(way=2, shot=1, query=1))
    return build_data(config, torch.device("cpu"))


def _parts(source: Any, name: str) -> dict[str, Any]:
    """The data sets that a source draws from, by name: one, but for data=multi."""
    from metarun.episodes.several import SeveralSources

    return dict(source.sources) if isinstance(source, SeveralSources) else {name: source}


def _stores(source: Any) -> dict[str, Any]:
    """The stores of a source that has some; a plugin's source is surrounded by its checks."""
    return dict(getattr(source, "stores", {}))


def _tell_counts(stores: dict[str, Any]) -> None:
    from metarun.episodes.inspection import counts

    for split, store in stores.items():
        print(f"{split}: {counts(store)}")


def _pairs(found: Sequence[tuple[Any, Any]]) -> list[str]:
    return [f"{one} = {other}" for one, other in found]


def _tell(what: str, found: Sequence[str]) -> None:
    print(f"{what}: {len(found):,}")
    for text in found[:SHOWN]:
        print(f"  {printable_name(text)}")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN:,} more")
