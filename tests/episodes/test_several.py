"""Episodes of several sources: whose, how often, and which."""

import pytest
import torch

from metarun.episodes.several import SeveralSources
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import from_equal_classes

CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")


def source(value: int, side: int = 2, **changes: int) -> ImageEpisodes:
    """Episodes of images of which each tells its source and its class."""
    numbers = torch.arange(6, dtype=torch.uint8)[:, None, None, None, None] + value
    images = numbers.expand(-1, 4, 1, side, side).contiguous()
    stores = {split: from_equal_classes(images, list("abcdef")) for split in SPLITS}
    shape = {"way": 3, "shot": 1, "query": 2} | changes
    return ImageEpisodes(stores, **shape, seed=3, device=CPU)


PARTS = {"low": source(0), "middle": source(100), "high": source(200)}


def several(weights: tuple[float, ...] = (1, 1, 1), seed: int = 3) -> SeveralSources:
    return SeveralSources(PARTS, weights, seed)


def owner(support: torch.Tensor) -> list[int]:
    """The source of each episode; all of its images are of it."""
    found = (support * 255).round().long().flatten(1) // 100
    assert (found == found[:, :1]).all()
    return [int(number) for number in found[:, 0]]


def test_a_training_episode_is_that_of_the_source_that_is_chosen() -> None:
    together = several().sample("train", 5, 40)
    chosen = several().chosen(5, 40).tolist()
    assert owner(together.support_x) == chosen and set(chosen) == {0, 1, 2}
    for place, number in enumerate(chosen):
        alone = list(PARTS.values())[number].sample("train", 5 + place, 1)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[place], part[0])


def test_sources_are_chosen_by_weight() -> None:
    counts = torch.tensor(several((1, 2, 5)).chosen(0, 8000).tolist()).bincount(minlength=3)
    expected = torch.tensor([1000.0, 2000.0, 5000.0])
    assert ((counts - expected) ** 2 / expected).sum() < 2 + 5 * 4**0.5


def test_other_episodes_are_of_each_source_in_turn() -> None:
    for split in ("val", "test"):
        together = several((1, 9, 1)).sample(split, 0, 10)
        assert owner(together.query_x) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
        for place in range(10):
            alone = list(PARTS.values())[place % 3].sample(split, place // 3, 1)
            for whole, part in zip(together, alone, strict=True):
                assert torch.equal(whole[place], part[0])


@pytest.mark.parametrize("split", SPLITS)
def test_an_episode_depends_on_seed_split_and_index_alone(split: str) -> None:
    whole = several().sample(split, 0, 20)
    for start, count in ((0, 1), (7, 5), (19, 1)):
        for a, b in zip(several().sample(split, start, count), whole, strict=True):
            assert torch.equal(a, b[start : start + count])
    assert several(seed=4).chosen(0, 20).tolist() != several().chosen(0, 20).tolist()


def test_images_of_another_shape_keep_their_episodes() -> None:
    before = several((1, 2, 5)).sample("train", 0, 20)
    other = several((1, 2, 5)).fitted((3, 2, 2))
    assert other.input_shape == (3, 2, 2) and other.identity != several().identity
    after = other.sample("train", 0, 20)
    assert torch.equal(after.query_x, before.query_x.expand(-1, -1, 3, -1, -1))


def test_sources_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the examples of one are 1×2×2, those of two 1×3×3"):
        SeveralSources({"one": source(0), "two": source(1, side=3)}, [1, 1], 0)
    lacking = source(0)
    lacking.stores = {"test": lacking.stores["test"]}
    with pytest.raises(ValueError, match="two has no train split"):
        SeveralSources({"one": source(0), "two": lacking}, [1, 1], 0)
