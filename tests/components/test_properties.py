"""What holds of every data set of the catalogue, whatever it is made of.

The data sets are built as a run builds them, from a config. Their images are small made-up ones,
each unlike all others, so that an image tells its class and its drawing.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from metarun.components.build import build_data
from metarun.components.data import (
    _benchmarks,
    _cifar100,
    _finding,
    emoji,
    glyphs,
    l2l,
    omniglot,
)
from metarun.components.data.emoji import arranged, concepts
from metarun.components.data.splits import omniglot_names
from metarun.config.catalogue import schemas
from metarun.episodes.ahead import Ahead
from metarun.episodes.source import Episodes, EpisodeSource, ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes, packed, split_stores
from tests.conftest import REPO
from tests.setups import config_of

CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")
SHAPE = ("task.way=4", "task.shot=3", "task.query=2", "engine.precision=float64")
SIDE = 4  # pixels of the made-up images
DRAWINGS = 6  # of each class

VARIANTS = {
    "features": [("data=features", "data.root=features.npz")],
    "folder": [("data=folder", "data.root=pictures", f"data.size={SIDE}")],
    "glyphs": [("data=glyphs",)],
    "omniglot": [
        ("data=omniglot", "data.rotations=false"),
        ("data=omniglot", "data.rotations=true"),
        ("data=omniglot", "data.split=vinyals"),
        ("data=omniglot", "data.split=background"),
    ],
    "emoji": [("data=emoji",), ("data=emoji", "data.split=group")],
    "mini_imagenet": [("data=mini_imagenet",)],
    "tiered_imagenet": [("data=tiered_imagenet",)],
    "cifar_fs": [("data=cifar_fs",)],
    "fc100": [("data=fc100",)],
    "l2l": [("data=l2l",), ("data=l2l", "data.rotations=false")],
    "cub": [("data=cub",), ("data=cub", "data.split=140-30-30")],
    "multi": [("data=multi", "data.sources=[{name:glyphs},{name:glyphs,seed:1}]")],
    "sinusoid": [("data=sinusoid",)],
    "sinusoid_line": [("data=sinusoid_line",)],
    "harmonic": [("data=harmonic", "data.noise=0.1")],
    "gp_curves": [("data=gp_curves",)],
}
"""How each data set of the catalogue is tried; one that is not here fails these tests."""

ELSEWHERE = {
    "lake": "tests/components/test_lake.py",  # fixed tasks, and no training
    "glyphs_examples": "tests/episodes/test_examples.py",  # no tasks at all
    "omniglot_examples": "tests/episodes/test_examples.py",
}
"""What draws no tasks, and where it is tried."""

OWN_SEEDS = {
    "features": ["split_seed"],
    "folder": ["split_seed"],
    "glyphs": ["seed"],
    "l2l": ["split_seed"],
    "omniglot": ["split_seed"],
}
"""The settings that are seeds, of each data set that has any."""

ALL = [variant for variants in VARIANTS.values() for variant in variants]
PUBLISHED = ("mini_imagenet", "tiered_imagenet", "cifar_fs", "fc100", "cub")
DRAWN = ("folder", "glyphs", "omniglot", "l2l", "emoji", *PUBLISHED)
IMAGES = [variant for name in DRAWN for variant in VARIANTS[name]]
by_name = pytest.mark.parametrize("data", ALL, ids=" ".join)


def drawn(classes: int, seed: int) -> Tensor:
    """Random images, so that no two are alike, nor one turned like another."""
    generator = torch.Generator().manual_seed(seed)
    shape = (classes, DRAWINGS, 1, SIDE, SIDE)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def made_up_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Images of the right number of classes in place of the drawn and the downloaded ones."""
    names = [f"alphabet{a:02}/character{c:02}" for a in range(1, 51) for c in range(1, 5)]

    def draw(seed: int = 0) -> tuple[Tensor, tuple[str, ...]]:
        return drawn(len(names), seed), tuple(names)

    def characters(root: Path | None, *, download: bool) -> ClassStore:
        return from_equal_classes(drawn(1623, 0), omniglot_names())

    def emojis(root: Path | None, size: int) -> ClassStore:
        sets = arranged(["noto", "twemoji", "emojione", "fluent-emoji", "openmoji", "fxemoji"])
        each = [f"{c.group}/{c.name}/{name}" for c in concepts() for name in sets]
        return from_equal_classes(drawn(len(concepts()), 0).flatten(0, 1)[:, None], each)

    def published(benchmark: _finding.Benchmark, *found: Any) -> dict[str, ClassStore]:
        names = [name for own in benchmark.splits.values() for name in own]
        store, splits = from_equal_classes(drawn(len(names), 0), names), {}
        for split, own in benchmark.splits.items():
            splits[split] = [names.index(name) for name in own]
        return split_stores(store, splits)

    here = tmp_path_factory.mktemp("data")
    rng, numbers = np.random.default_rng(0), np.repeat(np.arange(26), DRAWINGS)
    for place, number in enumerate(numbers):
        path = here / "pictures" / f"{number}" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    np.savez(here / "features.npz", features=rng.normal(size=(len(numbers), 9)), labels=numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "drawn", emojis)
        for module in (_benchmarks, _cifar100):
            patch.setattr(module, "find", lambda *given: None)
            patch.setattr(module, "read_source", published)
        patch.chdir(here)
        patch.setenv("METARUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("METARUN_DATA", raising=False)
        patch.setattr(glyphs, "draw", draw)
        patch.setattr(omniglot, "characters", characters)
        patch.setattr(l2l, "_files", lambda own: [])
        patch.setattr(l2l, "_omniglot", lambda own: characters(None, download=False))
        yield


def built(*overrides: str) -> EpisodeSource:
    """The data set as a run builds it, from its config."""
    return build_data(config_of(*overrides, *SHAPE), CPU)


source_of = cache(built)


def stores_of(*overrides: str) -> dict[str, ClassStore]:
    source = source_of(*overrides)
    assert isinstance(source, ImageEpisodes)
    return {split: packed(store) for split, store in source.stores.items()}


def keys(examples: Tensor) -> list[bytes]:
    """Each example by its value: two examples are the same if their keys are."""
    return [example.numpy().tobytes() for example in examples]


def parts_equal(one: Episodes, other: Episodes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def class_of_image(store: ClassStore) -> dict[bytes, int]:
    """The class of each image as an episode shows it, by its value."""
    pixels = keys(packed(store).images.double() / 255)
    return {key: i // DRAWINGS for i, key in enumerate(pixels)}


def shown(source: ImageEpisodes, split: str) -> Tensor:
    """The images of a split, class by class, as episodes show them."""
    return packed(source.stores[split]).images.double() / 255


def test_every_data_set_and_every_seed_of_it_is_tried() -> None:
    assert VARIANTS.keys() | ELSEWHERE.keys() == schemas("data").keys()
    assert all((REPO / path).is_file() for path in ELSEWHERE.values())
    for name, schema in schemas("data").items():
        if name in ELSEWHERE:
            continue
        seeds = [own.name for own in fields(schema) if "seed" in own.name]
        assert seeds == OWN_SEEDS.get(name, [])


@by_name
def test_no_query_is_in_the_support(data: tuple[str, ...]) -> None:
    """Judged by what the network sees: an x that it has adapted to tells the answer."""
    source = source_of(*data)
    for split in SPLITS:
        episodes = source.sample(split, 0, 60)
        for support, query in zip(episodes.support_x, episodes.query_x, strict=True):
            together = keys(support) + keys(query)
            assert len(set(together)) == len(together)


@by_name
def test_splits_share_no_task(data: tuple[str, ...]) -> None:
    source = source_of(*data)
    seen = {}
    for split in SPLITS:
        episodes = source.sample(split, 0, 60)
        seen[split] = {
            *keys(episodes.support_x.flatten(0, 1)),
            *keys(episodes.query_x.flatten(0, 1)),
        }
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_splits_share_no_class_and_no_image(data: tuple[str, ...]) -> None:
    stores = stores_of(*data)
    for what in (lambda store: store.class_names, lambda store: keys(packed(store).images)):
        found: list[Any] = [value for split in SPLITS for value in what(stores[split])]
        assert len(set(found)) == len(found)
    bare = {
        split: {re.sub(r"/rot(0|90|180|270)(?=/)", "", name) for name in names}
        for split, names in ((split, stores[split].class_names) for split in SPLITS)
    }
    assert not bare["train"] & bare["val"] and not bare["train"] & bare["test"]
    assert not bare["val"] & bare["test"], "a character turned is the same character"


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_a_split_draws_from_its_own_images_alone(data: tuple[str, ...]) -> None:
    source = source_of(*data)
    assert isinstance(source, ImageEpisodes)
    for split in SPLITS:
        own = class_of_image(source.stores[split])
        episodes = source.sample(split, 0, 60)
        seen = keys(episodes.support_x.flatten(0, 1)) + keys(episodes.query_x.flatten(0, 1))
        assert set(seen) <= own.keys()


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_a_label_means_one_class_and_labels_are_balanced(data: tuple[str, ...]) -> None:
    source = source_of(*data)
    assert isinstance(source, ImageEpisodes)
    own = class_of_image(source.stores["train"])
    episodes = source.sample("train", 0, 60)
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        assert support_y.bincount(minlength=4).tolist() == [3, 3, 3, 3]
        assert query_y.bincount(minlength=4).tolist() == [2, 2, 2, 2]
        meaning: dict[int, set[int]] = {label: set() for label in range(4)}
        for x, y in ((support_x, support_y), (query_x, query_y)):
            for key, label in zip(keys(x), y.tolist(), strict=True):
                meaning[label].add(own[key])
        assert [len(classes) for classes in meaning.values()] == [1, 1, 1, 1]
        assert len(set.union(*meaning.values())) == 4, "two labels mean one class"


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_labels_are_permuted_from_episode_to_episode(data: tuple[str, ...]) -> None:
    """In the order of the classes, a network could know the label without the support."""
    source = source_of(*data)
    assert isinstance(source, ImageEpisodes)
    for split in SPLITS:
        own = class_of_image(source.stores[split])
        episodes = source.sample(split, 0, 400)
        first = torch.tensor([own[key] for key in keys(episodes.support_x[:, 0])])
        last = torch.tensor([own[key] for key in keys(episodes.support_x[:, -1])])
        rising = int((first < last).sum())
        assert abs(rising - 200) < 5 * 10, "five standard deviations of 400 throws of a coin"


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_each_drawing_may_be_support_and_may_be_query(data: tuple[str, ...]) -> None:
    source = source_of(*data, "task.way=2")
    assert isinstance(source, ImageEpisodes)
    order = {key: i for i, key in enumerate(keys(shown(source, "test")))}
    episodes = source.sample("test", 0, 200)
    for x in (episodes.support_x, episodes.query_x):
        drawings = {order[key] % DRAWINGS for key in keys(x.flatten(0, 1))}
        assert drawings == set(range(DRAWINGS))


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_the_drawings_of_one_class_say_nothing_of_those_of_another(data: tuple[str, ...]) -> None:
    """Drawing d is by the same person throughout: all by one hand would be another task."""
    source = source_of(*data)
    assert isinstance(source, ImageEpisodes)
    order = {key: i for i, key in enumerate(keys(shown(source, "train")))}
    episodes = source.sample("train", 0, 100)
    drawings = [order[key] % DRAWINGS for key in keys(episodes.support_x.flatten(0, 1))]
    first, second = torch.tensor(drawings).view(100, 4, 3).unbind(1)[:2]
    same = int((first == second).sum())
    assert abs(same - 300 / DRAWINGS) < 5 * (300 / DRAWINGS) ** 0.5


@by_name
def test_an_episode_depends_on_the_seed_the_split_and_its_index_alone(
    data: tuple[str, ...],
) -> None:
    source, before = source_of(*data), torch.get_rng_state()
    for split in SPLITS:
        whole = source.sample(split, 0, 12)
        used = built(*data)
        used.sample("train", 3, 2)  # what was drawn before does not matter
        torch.manual_seed(5)
        ahead = Ahead(used, split)
        for start, count in ((11, 1), (0, 3), (3, 5)):
            part = Episodes(*(value[start : start + count] for value in whole))
            assert parts_equal(used.sample(split, start, count), part)
            assert parts_equal(ahead.sample(start, count), part)
    torch.set_rng_state(before)
    source.sample("train", 0, 2)
    assert torch.equal(before, torch.get_rng_state())


@by_name
def test_no_two_episodes_are_the_same(data: tuple[str, ...]) -> None:
    source = source_of(*data)
    seen = [key for split in SPLITS for key in keys(source.sample(split, 0, 40).support_x)]
    assert len(set(seen)) == 3 * 40


@by_name
def test_the_seed_of_the_run_changes_the_episodes_and_not_the_data(data: tuple[str, ...]) -> None:
    one, other = source_of(*data, "seed=0"), source_of(*data, "seed=1")
    for split in SPLITS:
        shared = set(keys(one.sample(split, 0, 40).support_x))
        assert not shared & set(keys(other.sample(split, 0, 40).support_x))
    if isinstance(one, ImageEpisodes) and isinstance(other, ImageEpisodes):
        for split in SPLITS:
            assert torch.equal(one.stores[split].images, other.stores[split].images)
            assert one.stores[split].class_names == other.stores[split].class_names


def test_the_seed_of_the_glyphs_changes_the_drawings_alone() -> None:
    one, other = stores_of("data=glyphs"), stores_of("data=glyphs", "data.seed=1")
    for split in SPLITS:
        assert not set(keys(packed(one[split]).images)) & set(keys(packed(other[split]).images))
        assert one[split].class_names == other[split].class_names


@pytest.mark.parametrize("rotations", ["true", "false"])
def test_the_seed_of_the_split_changes_which_characters_a_split_has(rotations: str) -> None:
    data = ("data=omniglot", f"data.rotations={rotations}")
    one, other = stores_of(*data), stores_of(*data, "data.split_seed=1")
    for split in SPLITS:
        assert len(one[split].class_names) == len(other[split].class_names)
        assert one[split].class_names != other[split].class_names
    together = [{name for s in SPLITS for name in stores[s].class_names} for stores in (one, other)]
    assert together[0] == together[1]


@by_name
def test_the_shape_of_the_task_is_the_shape_of_the_episodes(data: tuple[str, ...]) -> None:
    source = source_of(*data)
    classes = 4 if source.kind == "classification" else 1
    for split in SPLITS:
        episodes = source.sample(split, 5, 2)
        assert episodes.support_x.shape == (2, classes * 3, *source.input_shape)
        assert episodes.query_x.shape == (2, classes * 2, *source.input_shape)
        assert episodes.support_y.shape[:2] == (2, classes * 3)
        assert episodes.query_y.shape[:2] == (2, classes * 2)
        assert episodes.support_x.dtype == episodes.query_x.dtype == torch.float64


@pytest.mark.parametrize("data", IMAGES, ids=" ".join)
def test_pixels_are_shown_between_zero_and_one(data: tuple[str, ...]) -> None:
    x = source_of(*data).sample("train", 0, 60).support_x
    assert x.min() == 0 and x.max() == 1, "of random images of 256 grey levels"


def test_sines_have_one_amplitude_and_one_phase_for_support_and_query() -> None:
    """Two points of the support settle both; every query lies on that curve."""
    for split in SPLITS:
        episodes = source_of("data=sinusoid", "task.shot=5").sample(split, 0, 100)
        basis = torch.cat([episodes.support_x.sin(), episodes.support_x.cos()], dim=2)
        curve = torch.linalg.lstsq(basis, episodes.support_y).solution
        basis = torch.cat([episodes.query_x.sin(), episodes.query_x.cos()], dim=2)
        torch.testing.assert_close(basis @ curve, episodes.query_y, rtol=1e-6, atol=1e-6)
        curves = curve[:, :, 0].tolist()
        assert len({tuple(round(value, 6) for value in c) for c in curves}) == 100
