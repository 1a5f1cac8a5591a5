"""Whether classes of a test were trained on: by another source, by the run, by that of its weights.

Figures of such a test are too good. It is seen by the pictures, so that it holds of any data.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch

from metarun.components.build import build_data
from metarun.components.weights_file import run_behind
from metarun.config.catalogue import schemas
from metarun.config.changes import shared_root
from metarun.config.run import TrainConfig
from metarun.config.trained import EvalConfig
from metarun.episodes.identity import identity_of, same_data
from metarun.episodes.several import SeveralSources
from metarun.episodes.shared import Pictures, Seen, class_pictures, count_seen, together
from metarun.episodes.source import EpisodeSource
from metarun.errors import MetarunError
from metarun.training.domain import LEAST
from metarun.training.setup import Setup, from_plain

log = logging.getLogger(__name__)

IN_TRAINING, BY_WEIGHTS = "seen_in_training", "seen_by_weights"
"""Of the figures in result.json: `Seen` as plain values; left out where no class was seen."""

SHARED = "shared_by_sources"
"""Of the figures: how many classes are in the split of two of the sources."""

NAMES = {"train": "training", "val": "validation", "test": "test"}
TOO_GOOD = {
    "test": "test figures are too good",
    "val": "they choose a worse checkpoint as the best",
}


def among_sources(
    source: EpisodeSource, split: str, more: Sequence[str] = (), own: str | None = None
) -> dict[str, Any]:
    """Warn of classes of one of the run's sources that it, or another, has in another split.

    Args:
        source: of the run; of one that is alone nothing is said unless it has a name.
        split: whose classes are counted in the figures: "val" or "test".
        more: further splits to warn of.
        own: name of a source that is alone, if a user has put it together (`own_name`).

    Returns:
        What the figures say of it.
    """
    sources: dict[str, EpisodeSource] = {} if own is None else {own: source}
    if isinstance(source, SeveralSources):
        sources = source.sources
    if not sources or split == "train":
        return {}
    found = {
        name: {part: class_pictures(each, part) for part in NAMES} for name, each in sources.items()
    }
    whole = {name: {p: together(own[p]) for p in NAMES} for name, own in found.items()}
    for name, other in product(found, repeat=2):
        for part in (split, *more):
            _warn_of_source(name, other, part, found[name][part], whole[other])
    trained = together(each["train"] for each in whole.values())
    validated = together(each["val"] for each in whole.values()) if split == "test" else set()
    counted = [count_seen(each[split], trained, validated) for each in found.values()]
    seen = Seen(*(sum(each) for each in zip(*counted, strict=True)))
    return _plain(IN_TRAINING, seen) | _shared({n: each[split] for n, each in found.items()}, split)


def own_name(data: Any) -> str | None:
    """The name of data that a user has put together, with splits that may share pictures.

    Others are known to share none.

    Args:
        data: their settings.
    """
    return data.name if getattr(data, "own_root", False) else None


def shared_by_sources(source: EpisodeSource, split: str) -> dict[str, Any]:
    """Warn of classes that several sources have in the split that is evaluated.

    Returns:
        What the figures say of it.
    """
    if not isinstance(source, SeveralSources):
        return {}
    return _shared({n: class_pictures(own, split) for n, own in source.sources.items()}, split)


def _shared(found: dict[str, list[Pictures]], split: str) -> dict[str, Any]:
    twice = 0
    for one, other in combinations(found, 2):
        both = count_seen(found[one], together(found[other]), set())
        twice += both.trained_on
        if both.trained_on:
            log.warning(
                "%s and %s share %s %s classes: their tasks may be the same, which then count "
                "twice, and the interval is too narrow",
                one, other, _share(both.trained_on, both.of), NAMES[split],
            )  # fmt: skip
    return {SHARED: twice} if twice else {}


def _warn_of_source(
    name: str, other: str, split: str, own: Sequence[Pictures], there: dict[str, Pictures]
) -> None:
    seen = count_seen(own, there["train"], there["val"] if split == "test" else set())
    where = "as well (metarun data check names the pictures)" if name == other else f"of {other}"
    for count, part in ((seen.trained_on, "train"), (seen.validated_on, "val")):
        if count:
            log.warning(
                "%s %s classes of %s are %s classes %s: %s",
                _share(count, seen.of), NAMES[split], name, NAMES[part], where, TOO_GOOD[split],
            )  # fmt: skip


def by_training(
    setup: Setup, stored: TrainConfig, identity: str | None, asked: EvalConfig
) -> dict[str, Any]:
    """Warn of classes of an evaluation on other data that the run was trained on.

    Args:
        setup: of the evaluation.
        stored: the config of the run.
        identity: of its data.
        asked: the command's config.

    Returns:
        What the figures say of it.
    """
    source = setup.source
    if source.kind != "classification":
        return {}
    if asked.data.fit or asked.data.invert:  # the pictures as they were before
        source = _least(setup.config)
    trained = _source_of(stored, identity, asked.data.root)
    seen = _compared(source, trained, asked.split, "training")
    return _told(seen, IN_TRAINING, asked.split, "by the run")


def by_weights(setup: Setup, split: str) -> dict[str, Any]:
    """Warn of classes of a split that the run of `backbone.weights` was trained on.

    Returns:
        What the figures say of it.
    """
    path = vars(setup.config.backbone).get("weights")
    if path is None or setup.source.kind != "classification":
        return {}
    try:
        content = run_behind(path)
        if content is None:
            return {}
        identity = content.get("data_identity")
        if identity == setup.identity:  # the same split
            return {}
        trained = _source_of(from_plain(content["config"]), identity, None)
    except MetarunError as error:
        _tell_why("backbone.weights", str(error))
        return {}
    seen = _compared(setup.source, trained, split, "backbone.weights")
    return _told(seen, BY_WEIGHTS, split, "by the run of backbone.weights")


def seen_words(figures: dict[str, Any], split: str) -> str:
    """What a result line says of classes that were seen before; empty: none were."""
    told = ""
    for key, by in ((IN_TRAINING, ""), (BY_WEIGHTS, ", by the run of backbone.weights")):
        if isinstance(seen := figures.get(key), dict):
            told += f", {_words(Seen(**seen), split)}{by}"
    return told


def _told(seen: Seen | None, key: str, split: str, by: str) -> dict[str, Any]:
    """Warn of classes that were seen, and what the figures say of them."""
    if seen is None:
        return {}
    if found := _plain(key, seen):
        log.warning("%s, %s: figures are too good", _words(seen, split), by)
    return found


def _words(seen: Seen, split: str) -> str:
    trained = f"{_share(seen.trained_on, seen.of)} {NAMES[split]} classes were trained on"
    if not seen.validated_on:
        return trained
    if not seen.trained_on:
        return f"{_share(seen.validated_on, seen.of)} {NAMES[split]} classes were validated on"
    return f"{trained} and {seen.validated_on:,} validated on"


def _plain(key: str, seen: Seen) -> dict[str, Any]:
    return {key: seen._asdict()} if seen.trained_on or seen.validated_on else {}


def _share(count: int, of: int) -> str:
    return f"{count:,} of {of:,}"


def _compared(
    source: EpisodeSource, trained: EpisodeSource | None, split: str, whose: str
) -> Seen | None:
    """How many classes of a split are of the training or validation of an earlier run.

    None where they cannot be compared.
    """
    if trained is None:
        _tell_why(whose, "its data are not here")
        return None
    if tuple(source.input_shape) != tuple(trained.input_shape):
        _tell_why(whose, "pictures of another size or colour are never the same")
        return None
    classes = class_pictures(source, split)
    seen = [class_pictures(trained, part) for part in ("train", "val")]
    if not classes or not seen[0]:
        _tell_why(whose, "the tasks are drawn from no pictures")
        return None
    return count_seen(classes, *map(together, seen))


def _tell_why(whose: str, reason: str) -> None:
    log.info("classes not compared with those of %s: %s", whose, reason)


def _source_of(stored: TrainConfig, identity: str | None, root: str | None) -> EpisodeSource | None:
    """The data of an earlier run; None where they are not here, or have changed."""
    data = _without_download(stored.data)
    places: list[str | None] = [None]
    if hasattr(data, "root"):
        places = [shared_root(stored.data.name), root, data.root]
        places = [place for place in places if place is not None] or [None]
    for place in dict.fromkeys(places):
        try:
            here = data if place is None else replace(data, root=place)
            with _quietly():
                source = _least(replace(stored, data=here))
            if identity is None or same_data(identity, identity_of(source)):
                return source
        except (MetarunError, OSError):
            continue
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the words about data that nothing is evaluated on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _least(config: TrainConfig) -> EpisodeSource:
    """The data of a config, with tasks that any have."""
    return build_data(replace(config, task=LEAST), torch.device("cpu"))


def _without_download(data: Any) -> Any:
    """Settings of data that are read where they are: a checkpoint says no place to write to."""
    if hasattr(data, "download"):
        return replace(data, download=False)
    if hasattr(data, "sources"):
        of = schemas("data")
        off = {"download": False}
        sources = [o | (off if hasattr(of[o["name"]], "download") else {}) for o in data.sources]
        return replace(data, sources=sources)
    return data
