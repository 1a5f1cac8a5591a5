"""The embedded dataset: its form, its determinism, its cache, and how hard it is."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun.components.data import glyphs

Dataset = tuple[Tensor, tuple[str, ...]]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return glyphs.draw(0)


@pytest.fixture
def pixels(dataset: Dataset) -> Tensor:
    """Ink between 0 and 1, (characters, 20, 784)."""
    return dataset[0].flatten(2).float() / 255


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> list[int]:
    """The seeds that were drawn instead of read from the cache; nothing is drawn anew."""
    seeds: list[int] = []

    def draw(seed: int = 0) -> Dataset:
        seeds.append(seed)
        return dataset

    monkeypatch.setattr(glyphs, "draw", draw)
    return seeds


@pytest.fixture
def draw_two_alphabets(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Dataset]:
    """Alphabets are drawn in turn, so that the first two can be had in a moment."""
    monkeypatch.setattr(glyphs, "ALPHABETS", 2)
    return glyphs.draw


def test_about_a_thousand_characters_of_twenty_drawings(dataset: Dataset) -> None:
    images, names = dataset
    assert images.dtype == torch.uint8
    assert images.shape == (len(names), 20, 1, 28, 28)
    assert 900 <= len(names) <= 1100
    assert images.min() == 0 and images.max() == 255
    between = (images > 0) & (images < 255)
    assert between.sum() > 0.2 * (images > 0).sum(), "strokes have smooth edges"


def test_names_are_unique_and_grouped_by_alphabet(dataset: Dataset) -> None:
    names = dataset[1]
    assert names[0] == "alphabet01/character01"
    assert list(names) == sorted(set(names))
    alphabets = [name.split("/")[0] for name in names]
    sizes = [alphabets.count(alphabet) for alphabet in set(alphabets)]
    assert len(sizes) == 50
    assert min(sizes) >= 15 and max(sizes) <= 25


def test_same_seed_gives_the_same_bits(
    dataset: Dataset, draw_two_alphabets: Callable[[int], Dataset]
) -> None:
    images, names = draw_two_alphabets(0)
    assert names == dataset[1][: len(names)]
    assert torch.equal(images, dataset[0][: len(names)])


def test_another_process_with_other_threads_gives_the_same_bits(
    draw_two_alphabets: Callable[[int], Dataset],
) -> None:
    here = hashlib.sha256(draw_two_alphabets(3)[0].numpy().tobytes()).hexdigest()
    program = (
        "import hashlib, torch; from metarun.components.data import glyphs; glyphs.ALPHABETS = 2\n"
        f"torch.set_num_threads({1 + torch.get_num_threads() % 2})\n"
        "print(hashlib.sha256(glyphs.draw(3)[0].numpy().tobytes()).hexdigest())"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here


def test_another_seed_gives_other_characters(
    dataset: Dataset, draw_two_alphabets: Callable[[int], Dataset]
) -> None:
    images, _ = draw_two_alphabets(1)
    assert not torch.equal(images[:15], dataset[0][:15])


def test_global_random_states_are_left_alone(
    draw_two_alphabets: Callable[[int], Dataset],
) -> None:
    def states() -> tuple[object, ...]:
        numpy_state = np.random.get_state(legacy=False)
        return torch.get_rng_state().tolist(), repr(numpy_state), random.getstate()

    before = states()
    draw_two_alphabets(0)
    assert states() == before


def test_splits_are_whole_alphabets_and_complete(
    dataset: Dataset, own_cache: Path, draws: list[int]
) -> None:
    stores = glyphs.load()
    assert list(stores) == ["train", "val", "test"]
    alphabets = {
        split: {name.split("/")[0] for name in store.class_names} for split, store in stores.items()
    }
    assert not alphabets["train"] & alphabets["val"]
    assert not alphabets["train"] & alphabets["test"]
    assert not alphabets["val"] & alphabets["test"]
    names = [name for store in stores.values() for name in store.class_names]
    assert sorted(names) == list(dataset[1])
    for split, share in {"train": 0.64, "val": 0.16, "test": 0.20}.items():
        assert len(stores[split].class_names) / len(names) == pytest.approx(share, abs=0.03)


def test_split_stores_hold_the_drawings_of_their_characters(
    dataset: Dataset, own_cache: Path, draws: list[int]
) -> None:
    images, names = dataset
    for split, store in glyphs.load().items():
        assert {glyphs.split_of(name) for name in store.class_names} == {split}
        assert store.sizes.tolist() == [20] * len(store.class_names)
        rows = [names.index(name) for name in store.class_names]
        assert torch.equal(store.images, images[rows].flatten(0, 1))


def test_every_drawing_has_a_sane_amount_of_ink_inside_the_frame(dataset: Dataset) -> None:
    ink = dataset[0].float() / 255
    share = ink.mean(dim=(-1, -2))
    assert share.min() > 0.01 and share.max() < 0.3
    assert 0.04 < share.mean() < 0.12
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert ink[..., frame].max() < 0.6, "at most the edge of a line"


def test_drawings_of_a_character_differ(pixels: Tensor) -> None:
    distance = torch.cdist(pixels, pixels) + 100 * torch.eye(20)
    assert distance.min() > 0.5


def test_characters_of_an_alphabet_differ(dataset: Dataset, pixels: Tensor) -> None:
    alphabets = [name.split("/")[0] for name in dataset[1]]
    means = pixels.mean(1)
    for alphabet in set(alphabets):
        own = means[[index for index, other in enumerate(alphabets) if other == alphabet]]
        distance = torch.cdist(own, own) + 100 * torch.eye(len(own))
        assert distance.min() > 1.0, alphabet


def test_drawings_are_closer_within_a_character_than_between(pixels: Tensor) -> None:
    within = torch.cdist(pixels, pixels).sum() / (len(pixels) * 20 * 19)
    one_each = pixels[:, 0]
    between = torch.cdist(one_each, one_each).sum() / (len(pixels) * (len(pixels) - 1))
    assert within < 0.95 * between


def test_raw_pixels_neither_solve_the_tasks_nor_fail_them(dataset: Dataset, pixels: Tensor) -> None:
    test = pixels[[glyphs.split_of(name) == "test" for name in dataset[1]]]
    generator = torch.Generator().manual_seed(0)
    correct = []
    for _ in range(300):  # 5-way 1-shot, 15 queries a class, the nearest neighbour's class
        classes = torch.randperm(len(test), generator=generator)[:5]
        order = torch.stack([torch.randperm(20, generator=generator)[:16] for _ in range(5)])
        task = test[classes[:, None], order]
        nearest = torch.cdist(task[:, 1:].flatten(0, 1), task[:, 0]).argmin(1).view(5, 15)
        correct.append((nearest == torch.arange(5)[:, None]).float().mean())
    assert 0.55 < torch.stack(correct).mean() < 0.67


def test_second_load_comes_from_the_cache(own_cache: Path, draws: list[int]) -> None:
    first, second = glyphs.load(0), glyphs.load(0)
    assert draws == [0]
    for split in glyphs.SPLITS:
        assert torch.equal(first[split].images, second[split].images)
        assert torch.equal(first[split].starts, second[split].starts)
        assert torch.equal(first[split].sizes, second[split].sizes)
        assert first[split].class_names == second[split].class_names
    glyphs.load(1)
    assert draws == [0, 1], "each seed has a cache of its own"


def test_damaged_cache_is_rebuilt(dataset: Dataset, own_cache: Path, draws: list[int]) -> None:
    glyphs.load(0)
    (file,) = own_cache.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:5000])
    store = glyphs.load(0)["train"]
    assert draws == [0, 0]
    assert torch.equal(store.images, dataset[0][: len(store.class_names)].flatten(0, 1))
    glyphs.load(0)
    assert draws == [0, 0], "the cache is whole again"
