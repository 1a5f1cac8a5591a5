"""Several data sets at once: each task is of one of them."""

from dataclasses import field
from typing import Any

import torch

from metarun.config.catalogue import builder, is_in_shared_root, schemas
from metarun.config.checks import absolute, between, finite, read
from metarun.config.component import as_keywords, builds, finder_of, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.several import SeveralSources
from metarun.episodes.source import EpisodeSource, ImageEpisodes
from metarun.errors import ConfigError, did_you_mean

EXAMPLE = "expected e.g. [{name: omniglot}, {name: glyphs, weight: 2}]"


@settings
class MultiConfig:
    """Several data sets: each training task is of one, drawn by weight; evaluation is on each."""

    root: str | None = None  # folder of data sets, for sources that name none
    sources: list[dict[str, Any]] = field(  # each: name of a data set, weight (1), its settings
        default_factory=lambda: [{"name": "omniglot"}, {"name": "glyphs"}]
    )
    shape: list[int] | None = None  # channels, height, width of all images; null: they must agree

    def __post_init__(self) -> None:
        self.root = absolute(self.root)
        if len(self.sources) < 2:
            raise ConfigError(f"data.sources must be two data sets or more; {EXAMPLE}")
        for place in range(len(self.sources)):
            source_settings(self, place)
        if self.shape is not None:
            if len(self.shape) != 3 or self.shape[0] not in (1, 3):
                raise ConfigError(f"data.shape={self.shape}: expected e.g. [3,84,84]")
            for size in self.shape[1:]:
                between("data.shape", size, 1, 4096)


def source_settings(own: MultiConfig, place: int) -> tuple[Any, float]:
    """The settings of a source, and its weight.

    Raises:
        ConfigError: there is no such data set, or a setting is not allowed.
    """
    what, given = f"data.sources[{place}]", dict(own.sources[place])
    name, weight = given.pop("name", None), given.pop("weight", 1)
    if not isinstance(name, str):
        raise ConfigError(f"{what} has no name; {EXAMPLE}")
    known = [other for other in schemas("data") if other != "multi"]
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"{what}: there is no data set {name!r}{hint}; there are {known}")
    if type(weight) not in (int, float) or weight <= 0:
        raise ConfigError(f"{what}: weight={weight}: must be a number above 0")
    finite(f"{what}: weight", weight)
    if is_in_shared_root(name):
        given = {"root": own.root} | given
    return read(what, schemas("data")[name], {"name": name} | given), float(weight)


def names_of(own: MultiConfig) -> list[str]:
    """The names of the sources; a data set that occurs again has a number behind its name."""
    names: list[str] = []
    for source in own.sources:
        again = [name for name in names if name.partition(" ")[0] == source["name"]]
        names.append(source["name"] + (f" {len(again) + 1}" if again else ""))
    return names


@builds(MultiConfig)
def multi(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: MultiConfig
) -> SeveralSources:
    """Episodes of the sources.

    Raises:
        ConfigError: the sources do not go together.
    """
    sources: dict[str, EpisodeSource] = {}
    weights = []
    for place, name in enumerate(names_of(own)):
        settings_, weight = source_settings(own, place)
        build = builder("data", settings_.name)
        source = build(task, seed, device, dtype, **as_keywords(settings_))
        if own.shape is not None:
            if not isinstance(source, ImageEpisodes):
                raise ConfigError(f"data.shape: {name} has no images that could be changed")
            source = source.fitted(tuple(own.shape))
        sources[name] = source
        weights.append(weight)
    try:
        return SeveralSources(sources, weights, seed)
    except ValueError as error:
        first = "×".join(map(str, sources[names_of(own)[0]].input_shape))
        helps = first.count("×") == 2 and "examples" in str(error)
        remedy = (
            f"; give the sources a size (or color) that agrees, or data.shape="
            f"[{first.replace('×', ',')}], which brings all images to that shape"
        )
        raise ConfigError(f"data.sources: {error}{remedy * helps}") from error


@finds(MultiConfig)
def found(own: MultiConfig) -> str:
    """Where the files of each source are."""
    told = []
    for place, name in enumerate(names_of(own)):
        settings_, _ = source_settings(own, place)
        builder("data", settings_.name)  # imports its file
        find = finder_of(type(settings_))
        told.append(f"{name}: {'needs no files' if find is None else find(settings_)}")
    return "; ".join(told)
