"""Emoji: some 900 concepts, each drawn in colour by up to nine sets of six houses.

The drawings are those of the npm packages @iconify-json/<set>, under licences of their own
(`_emoji_packages.SETS`). They are drawings, not photographs.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from metarun.components.data._data_root import home
from metarun.components.data._emoji_packages import SETS, drawings, find, fingerprint
from metarun.components.data.images import image_episodes
from metarun.config.checks import absolute, between
from metarun.config.component import as_keywords, builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.cache import cached
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, derived, from_sizes
from metarun.errors import ConfigError, DataError
from metarun.pictures.decode import Preprocessing
from metarun.pictures.inputs import Inputs, reads
from metarun.system.files import cache_dir

TEST_HOUSES = ("Google", "Twitter", "EmojiOne")  # of split=artist
PARTS = ("train", "val", "test")


@settings
class EmojiConfig:
    """Emoji: 938 concepts in colour, drawn by six houses."""

    # With one drawing a house, five of a class are sure.
    usual: ClassVar[dict[str, dict[str, Any]]] = {"task": {"way": 5, "shot": 1, "query": 4}}

    root: str | None = None  # folder of data sets; null: a cache folder of the user
    size: int = 84  # pixels of each side
    split: Literal["class", "group", "artist"] = "class"  # what is new in the test
    twins: Literal["one_per_house", "keep"] = "one_per_house"  # of two drawings of one house

    def __post_init__(self) -> None:
        self.root = absolute(self.root)
        between("data.size", self.size, 8, 1024)


@builds(EmojiConfig)
def emoji(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: EmojiConfig
) -> ImageEpisodes:
    """Episodes of the concepts: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, **as_keywords(own))


@finds(EmojiConfig)
def found(own: EmojiConfig) -> str:
    """Where the packages are.

    Raises:
        DataError: some are missing.
    """
    packages = find(home(own.root))
    return f"{len(packages)} packages in {packages['noto'].parent}"


@reads(EmojiConfig)
def inputs(own: EmojiConfig) -> Inputs:
    """What a network gets of a picture: all of it, on white."""
    return Inputs(Preprocessing(own.size, "pad"))


class Concept(NamedTuple):
    """A class: the group of Unicode, its name, and the part of each split that has it."""

    group: str
    name: str
    by_class: str
    by_group: str


@cache
def concepts() -> tuple[Concept, ...]:
    """The published list of classes, `lists/emoji.txt`."""
    text = (files(__package__) / "lists" / "emoji.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return tuple(Concept(*line.split("\t")) for line in lines)


def load(
    root: str | Path | None = EmojiConfig.root,
    *,
    size: int = EmojiConfig.size,
    split: str = EmojiConfig.split,
    twins: str = EmojiConfig.twins,
) -> dict[str, ClassStore]:
    """The drawings of each split, size x size in colour, on white.

    Args:
        root: the folder of the packages, or of a folder `emoji` with them.
        size: pixels of each side.
        split: "class" has other concepts in each part, drawn by lot (600, 150 and 188); "group"
            has other groups of concepts (616, 175 and 147: food and activities are the test);
            "artist" has the concepts of "class", those of the test by other houses than those of
            training and validation.
        twins: "keep" has all drawings of a concept, 7 to 9; "one_per_house" one a house, 5 or 6.
            Drawings of one house are often nearly the same, so "keep" makes for easier tasks, in
            which the answer may be a twin of an example.

    Returns:
        Stores "train", "val" and "test", whose classes are called group/concept.

    Raises:
        DataError: packages are missing, damaged, or lack drawings of the list.
        ConfigError: resvg-py, which draws them, is not installed.
    """
    whole = drawn(root, size)
    return {part: part_of(whole, part, split, twins) for part in PARTS}


def drawn(root: str | Path | None, size: int) -> ClassStore:
    """All drawings, as `render` gives them; drawn once and kept.

    Raises:
        DataError: see `load`.
        ConfigError: see `load`.
    """
    packages = find(home(root))
    path = cache_dir() / f"emoji-v1-{fingerprint(packages)}-{size}.safetensors"
    return cached(path, lambda: render(packages, size))


def render(packages: Mapping[str, Path], size: int) -> ClassStore:
    """All drawings, each as a class of its own that is called group/concept/set.

    Those of a concept lie next to each other, in the order of `arranged`.

    Raises:
        DataError: see `load`.
        ConfigError: see `load`.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ConfigError("data=emoji needs resvg-py: pip install 'metarun[emoji]'") from error
    by_set = {name: drawings(package) for name, package in packages.items()}
    wanted = []
    for concept in concepts():
        there = arranged([name for name in SETS if concept.name in by_set[name]])
        if len({SETS[name].house for name in there}) < 5:
            raise DataError(
                f"only {', '.join(there) or 'none'} of {', '.join(map(str, packages.values()))} "
                f"draw {concept.name!r}, which five houses should: take newer packages"
            )
        wanted += [(concept, name) for name in there]
    images = np.empty((len(wanted), 3, size, size), dtype=np.uint8)
    for place, (concept, name) in enumerate(tqdm(wanted, "drawing emoji", disable=None)):
        try:
            png = resvg_py.svg_to_bytes(
                by_set[name][concept.name], background="white", width=size, height=size,
                skip_system_fonts=True,
            )  # fmt: skip
        except ValueError as error:
            raise DataError(f"{packages[name]}: cannot draw {concept.name!r} ({error})") from error
        with Image.open(io.BytesIO(bytes(png)), formats=["PNG"]) as image:
            square = image.convert("RGB").resize((size, size))  # which it has, if it is square
        images[place] = np.asarray(square).transpose(2, 0, 1)
    names = [f"{concept.group}/{concept.name}/{name}" for concept, name in wanted]
    return from_sizes(torch.from_numpy(images), torch.ones(len(wanted), dtype=torch.int64), names)


def arranged(names: Sequence[str]) -> list[str]:
    """The sets that have a concept, so that each choice of `load` is a range of them.

    Twins of the houses that are tested with "artist", one set of each of these houses, one set of
    each other house, twins of these.
    """
    first = first_of_houses(names)

    def place(name: str) -> tuple[int, int]:
        house = SETS[name].house
        is_twin, tested = name != first[house], house in TEST_HOUSES
        return ([1, 0] if tested else [2, 3])[is_twin], list(SETS).index(name)

    return sorted(names, key=place)


def first_of_houses(names: Iterable[str]) -> dict[str, str]:
    """House -> the first of its sets among these, in the order of `SETS`."""
    return {SETS[name].house: name for name in sorted(names, key=list(SETS).index, reverse=True)}


def part_of(whole: ClassStore, part: str, split: str, twins: str) -> ClassStore:
    """A view of the drawings of one part of a split.

    Args:
        whole: what `render` gives.
        part: "train", "val" or "test".
        split, twins: as `load` has them.
    """
    members = {
        f"{concept.group}/{concept.name}"
        for concept in concepts()
        if (concept.by_group if split == "group" else concept.by_class) == part
    }
    names, starts, sizes = [], [], []
    each = (name.rsplit("/", 1) for name in whole.class_names)
    for concept, found in groupby(enumerate(each), key=lambda item: item[1][0]):
        if concept not in members:
            continue
        places = {name: place for place, (_, name) in found}
        first = first_of_houses(places)
        kept = [
            place
            for name, place in places.items()
            if (twins == "keep" or first[SETS[name].house] == name)
            and (split != "artist" or (SETS[name].house in TEST_HOUSES) == (part == "test"))
        ]
        names.append(concept)
        starts.append(kept[0])
        sizes.append(len(kept))
    known = derived(whole, "emoji", part, split, twins)
    return ClassStore(whole.images, _whole(starts), _whole(sizes), tuple(names), known)


def _whole(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
