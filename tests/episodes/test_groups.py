"""Tasks whose classes are all of one group: which, how often, and what stays as it was."""

from typing import Any

import pytest
import torch

from metarun.episodes.choosing import sample_indices
from metarun.episodes.groups import group_of, groups_for
from metarun.episodes.rng import stream_key
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes, with_rotations

CPU = torch.device("cpu")
SIZES = {"small": 2, "middle": 4, "large": 11}
NAMES = tuple(f"{group}/{own:02}" for group, count in SIZES.items() for own in range(count))
PER_CLASS = 4


def store() -> ClassStore:
    """Images that are squares of the number of their class."""
    numbers = torch.arange(len(NAMES), dtype=torch.uint8)
    images = numbers[:, None, None, None, None].expand(-1, PER_CLASS, 1, 2, 2)
    return from_equal_classes(images.contiguous(), NAMES)


def source(**changes: Any) -> ImageEpisodes:
    options: dict[str, Any] = {
        "way": 3,
        "shot": 1,
        "query": 2,
        "seed": 0,
        "device": CPU,
        "within": "group",
    }
    return ImageEpisodes({"train": store(), "test": store()}, **(options | changes))


def classes(images: torch.Tensor) -> torch.Tensor:
    return (images[..., 0, 0, 0] * 255).round().long()


def test_all_classes_of_a_task_are_of_one_group() -> None:
    episodes = source().sample("test", 0, 300)
    for support, query in zip(classes(episodes.support_x), classes(episodes.query_x), strict=True):
        assert len(set(support.tolist())) == 3
        assert query.tolist() == support.repeat_interleave(2).tolist()
        assert len({group_of(NAMES[number]) for number in support.tolist()}) == 1


def test_each_group_that_is_large_enough_is_as_likely() -> None:
    """Two of the three groups have three classes; that one has eleven makes it no likelier."""
    drawn = classes(source().sample("test", 0, 4000).support_x)
    groups = [group_of(NAMES[number]) for number in drawn[:, 0].tolist()]
    assert "small" not in groups
    assert abs(groups.count("middle") - 2000) < 5 * 1000**0.5
    large = drawn.flatten()[drawn.flatten() >= 6] - 6
    counts = large.bincount(minlength=11).double()
    expected = counts.sum() / 11
    assert ((counts - expected) ** 2 / expected).sum() < 10 + 5 * 20**0.5


def test_an_episode_depends_on_seed_split_and_index_alone() -> None:
    whole = source().sample("train", 0, 20)
    for start, count in ((0, 1), (7, 5), (19, 1)):
        for a, b in zip(source().sample("train", start, count), whole, strict=True):
            assert torch.equal(a, b[start : start + count])
    assert not torch.equal(whole.support_x, source(seed=1).sample("train", 0, 20).support_x)
    assert not torch.equal(whole.support_x, source().sample("test", 0, 20).support_x)


def test_the_draw_is_pinned() -> None:
    """These numbers must never change: a seed's tasks are part of a published result."""
    drawn = sample_indices(
        store(), key=stream_key("episodes", 0, "train"), start=3, count=2, way=3, per_class=2,
        groups=groups_for("train", NAMES, 3),
    )  # fmt: skip
    assert drawn.tolist() == PINNED


PINNED = [[[18, 19], [13, 15], [8, 11]], [[15, 13], [21, 23], [17, 18]]]


def test_training_tasks_may_be_within_groups_where_others_are_not() -> None:
    mixed = source(within="all")
    before = mixed.sample("train", 0, 50)
    inner = mixed.of_shape(3, 1, 2, "group").sample("train", 0, 50)
    assert torch.equal(inner.support_x, source().sample("train", 0, 50).support_x)
    assert torch.equal(before.support_x, mixed.sample("train", 0, 50).support_x)
    assert torch.equal(
        before.support_x, source().of_shape(3, 1, 2, "all").sample("train", 0, 50).support_x
    )


def test_a_turned_group_is_a_group_of_its_own() -> None:
    turned = with_rotations(store())
    assert group_of(turned.class_names[len(NAMES)]) == "small/rot90"
    episodes = ImageEpisodes(
        {"test": turned}, way=3, shot=1, query=1, seed=0, device=CPU, within="group"
    )
    place = {
        int(start): name for start, name in zip(turned.starts, turned.class_names, strict=True)
    }
    drawn = sample_indices(
        episodes.stores["test"], key=5, start=0, count=100, way=3, per_class=2,
        groups=groups_for("test", turned.class_names, 3),
    )  # fmt: skip
    for task in (drawn // PER_CLASS * PER_CLASS)[:, :, 0].tolist():
        assert len({group_of(place[start]) for start in task}) == 1


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no group of the train split has task.way=12 classes; "
                       "the largest, 'large', has 11"):  # fmt: skip
        source(way=12)
    with pytest.raises(ValueError, match=r"the classes of these data have no groups \('cat' in"):
        groups_for("val", ["a/b", "cat"], 2)
