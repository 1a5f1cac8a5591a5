"""The sampler's guarantees."""

import pytest
import torch

from metarun.components.data.sinusoid import Sinusoids
from metarun.episodes.choosing import sample_indices
from metarun.episodes.rng import random_bits, stream_key, uniform
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import (
    ClassStore,
    from_equal_classes,
    from_sizes,
    packed,
    select_classes,
    with_rotations,
)

CPU = torch.device("cpu")


def numbered(classes: int, per_class: int, first: int = 0) -> ClassStore:
    """A store whose every image tells which it is, by its pixels."""
    count = classes * per_class
    values = torch.arange(first, first + count)
    images = torch.stack([values // 256, values % 256], dim=-1).to(torch.uint8)
    images = images.reshape(classes, per_class, 1, 1, 2)
    return from_equal_classes(images, [f"class{first + c}" for c in range(classes)])


def source(**changes: object) -> ImageEpisodes:
    options = {"way": 5, "shot": 2, "query": 3, "seed": 0, "device": CPU} | changes
    stores = {"train": numbered(30, 10), "val": numbered(9, 10, 300), "test": numbered(5, 10, 400)}
    return ImageEpisodes(stores, **options, dtype=torch.float64)


def identity(images: torch.Tensor) -> torch.Tensor:
    """The number of each image of `numbered`."""
    pixels = (images * 255).round().long()
    return (pixels[..., 0, 0, 0] * 256) + pixels[..., 0, 0, 1]


def test_shapes_labels_and_range() -> None:
    episodes = source().sample("train", 0, 4)
    assert episodes.support_x.shape == (4, 10, 1, 1, 2)
    assert episodes.query_x.shape == (4, 15, 1, 1, 2)
    assert episodes.support_y[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert episodes.query_y[3].tolist() == [c for c in range(5) for _ in range(3)]
    assert episodes.support_x.min() >= 0 and episodes.support_x.max() <= 1


def test_support_and_query_are_disjoint_and_labels_mean_one_class() -> None:
    episodes = source().sample("train", 0, 200)
    support, query = identity(episodes.support_x), identity(episodes.query_x)
    for i in range(200):
        together = support[i].tolist() + query[i].tolist()
        assert len(set(together)) == 25
        classes = [set((support[i][episodes.support_y[i] == c] // 10).tolist()) for c in range(5)]
        assert all(len(c) == 1 for c in classes) and len(set.union(*classes)) == 5
        for c in range(5):
            assert set((query[i][episodes.query_y[i] == c] // 10).tolist()) == classes[c]


def test_splits_draw_from_their_own_images() -> None:
    seen = {
        split: set(identity(source().sample(split, 0, 50).support_x).flatten().tolist())
        for split in ("train", "val", "test")
    }
    assert max(seen["train"]) < 300 <= min(seen["val"]) <= max(seen["val"]) < 400
    assert min(seen["test"]) >= 400


def test_an_episode_depends_on_seed_split_and_index_alone() -> None:
    whole = source().sample("train", 0, 20)
    used = source()
    used.sample("val", 5, 3)  # what was drawn before does not matter
    for start, count in ((0, 1), (7, 5), (19, 1)):
        part = used.sample("train", start, count)
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[start : start + count])
    before = torch.get_rng_state()
    source().sample("train", 3, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_other_seeds_splits_and_indices_give_other_episodes() -> None:
    same_store = {"train": numbered(30, 10), "val": numbered(30, 10)}
    draws = []
    for seed in (0, 1):
        episodes = ImageEpisodes(same_store, way=5, shot=2, query=3, seed=seed, device=CPU)
        for split in ("train", "val"):
            batch = identity(episodes.sample(split, 0, 10).support_x)
            draws += [tuple(row) for row in batch.tolist()]
    assert len(set(draws)) == 40


def test_the_draw_is_pinned() -> None:
    """These numbers must never change: a seed's tasks are part of a published result."""
    store = numbered(30, 10)
    drawn = sample_indices(
        store, key=stream_key("episodes", 0, "train"), start=3, count=1, way=3, per_class=2
    )
    assert drawn.tolist() == PINNED


PINNED = [[[141, 144], [49, 44], [181, 185]]]


def test_classes_and_images_are_drawn_uniformly() -> None:
    store = numbered(10, 4)
    drawn = sample_indices(store, key=7, start=0, count=4000, way=2, per_class=2)
    first_class = (drawn[:, 0, 0] // 4).bincount(minlength=10).double()
    images = drawn.flatten().bincount(minlength=40).double()
    for counts in (first_class, images):
        expected = counts.sum() / counts.numel()
        chi2 = ((counts - expected) ** 2 / expected).sum()
        degrees = counts.numel() - 1
        assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


def test_labels_are_permuted_anew_in_each_task() -> None:
    """Every class has every label equally often: else a network could learn them by heart."""
    drawn = ImageEpisodes({"train": numbered(4, 3)}, way=4, shot=1, query=1, seed=5, device=CPU)
    episodes = drawn.sample("train", 0, 2000)
    classes = identity(episodes.support_x) // 3
    counts = torch.zeros(4, 4).double()
    ones = torch.ones(classes.numel()).double()
    counts.index_put_((classes.flatten(), episodes.support_y.flatten()), ones, accumulate=True)
    assert counts.sum() == 8000
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 9 + 5 * (2 * 9) ** 0.5
    assert len({tuple(row) for row in classes.tolist()}) == 24


def test_classes_of_different_sizes() -> None:
    sizes, offsets = torch.tensor([5, 9, 6]), torch.tensor([0, 5, 14, 20])
    store = from_sizes(torch.zeros(20, 1, 1, 1, dtype=torch.uint8), sizes, ("a", "b", "c"))
    drawn = sample_indices(store, key=1, start=0, count=300, way=3, per_class=5)
    owner = torch.bucketize(drawn, offsets[1:], right=True)
    assert (owner == owner[:, :, :1]).all() and (owner[:, :, 0].sort(dim=1).values[:, 2] == 2).all()
    for c in range(3):
        assert set(drawn[owner == c].tolist()) == set(range(offsets[c], offsets[c] + sizes[c]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": 6}, "task.way=6 is more than the 5 classes of the test split"),
        ({"shot": 8}, r"task.shot \+ task.query = 8 \+ 3 = 11 is more than the 10 images of class"),
    ],
)
def test_impossible_episodes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_rotations_are_classes_of_their_own() -> None:
    images = torch.arange(24, dtype=torch.uint8).reshape(3, 2, 1, 2, 2)
    turned = with_rotations(from_equal_classes(images, ["a", "b", "c"]))
    assert turned.class_names[:4] == ("rot0/a", "rot0/b", "rot0/c", "rot90/a")
    assert turned.sizes.tolist() == [2] * 12
    quarter = turned.images[turned.starts[3], 0]  # the first image of rot90/a
    assert quarter.tolist() == [[1, 3], [0, 2]]


def test_selecting_classes_keeps_images_with_their_names() -> None:
    chosen = select_classes(numbered(5, 2), [3, 1])
    assert chosen.class_names == ("class3", "class1")
    assert identity(packed(chosen).images.double() / 255).tolist() == [6, 7, 2, 3]
    assert chosen.starts.tolist() == [4, 0] and len(chosen.images) == 6, (
        "a view of what lies between"
    )


def test_random_bits_are_those_of_splitmix64() -> None:
    """The first outputs for seed 1234567, as published with the reference implementation."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    bits = random_bits(1234567, torch.arange(3))
    assert [value % 2**64 for value in bits.tolist()] == expected


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = uniform(5, torch.arange(100_000))
    assert 0 <= numbers.min() < 1e-4 and 1 - 1e-4 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.002


def test_sinusoids_are_sines_with_amplitude_and_phase_in_range() -> None:
    episodes = Sinusoids(shot=10, query=5, seed=0, device=CPU, dtype=torch.float64)
    x, y, qx, qy = episodes.sample("train", 0, 500)
    assert x.shape == y.shape == (500, 10, 1) and qx.shape == qy.shape == (500, 5, 1)
    assert x.min() >= -5 and x.max() <= 5
    # a sin(x - b) = c sin x + d cos x: two unknowns, so least squares on the support tells all.
    basis = torch.cat([x.sin(), x.cos()], dim=2)
    solution = torch.linalg.lstsq(basis, y).solution
    fitted = torch.cat([qx.sin(), qx.cos()], dim=2) @ solution
    torch.testing.assert_close(fitted, qy, rtol=1e-6, atol=1e-6)
    c, d = solution[:, 0, 0], solution[:, 1, 0]
    amplitude, phase = (c**2 + d**2).sqrt(), torch.atan2(-d, c)
    assert 0.1 <= amplitude.min() < 0.3 and 4.8 < amplitude.max() <= 5
    assert phase.min() >= -1e-6 and phase.max() <= torch.pi + 1e-6
    part = episodes.sample("train", 7, 2)
    assert torch.equal(part.query_y, qy[7:9])
    assert not torch.equal(episodes.sample("val", 0, 1).support_x, x[:1])
