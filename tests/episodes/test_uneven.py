"""Uneven tasks: what is drawn, by which rule, and how it is padded."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.config.run import EVEN, TaskConfig, TrainTaskConfig, redrawn
from metarun.config.shape import shape_of
from metarun.episodes.rng import random_bits, uniform
from metarun.episodes.source import Episodes, ImageEpisodes
from metarun.episodes.store import from_sizes
from metarun.episodes.uneven import PADDING, Uneven, draw_shots, uneven_of
from metarun.errors import ConfigError

SIZES = [9, 30, 12, 25, 40, 14, 11]
IMBALANCED = TaskConfig(way=6, shot=8, query=4, min_way=3, imbalanced=True, max_support=20)
EQUAL = TaskConfig(way=6, shot=5, query=4, min_way=2, min_shot=2)


def source(task: TaskConfig, seed: int = 0) -> ImageEpisodes:
    """Images whose only pixel is their number, above zero."""
    sizes = torch.tensor(SIZES)
    images = torch.arange(1, 1 + sum(SIZES)).to(torch.float64)[:, None]
    store = from_sizes(images, sizes, [f"c{i}" for i in range(len(SIZES))])
    return ImageEpisodes(
        {"train": store, "test": store},
        way=task.way,
        shot=task.shot,
        query=task.query,
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float64,
        uneven=uneven_of(task),
    )


def class_of(images: Tensor) -> Tensor:
    ends = torch.tensor(SIZES).cumsum(0)
    return torch.searchsorted(ends, images.long() - 1, right=True)


@pytest.mark.parametrize("task", [EQUAL, IMBALANCED])
def test_a_task_is_a_function_of_its_number_alone(task: TaskConfig) -> None:
    for split in ("train", "test"):
        whole = source(task).sample(split, 0, 12)
        for start, count in ((0, 1), (5, 3), (11, 1)):
            again = source(task).sample(split, start, count)
            for one, other in zip(whole, again, strict=True):
                assert torch.equal(one[start : start + count], other)
    other_seed = source(task, seed=1).sample("train", 0, 12)
    assert not torch.equal(source(task).sample("train", 0, 12).support_y, other_seed.support_y)
    assert not torch.equal(whole.support_y, source(task).sample("train", 0, 12).support_y)


@pytest.mark.parametrize("task", [EQUAL, IMBALANCED])
def test_a_task_is_class_by_class_and_then_padded(task: TaskConfig) -> None:
    drawn = source(task).sample("train", 0, 50)
    assert drawn.support_x.shape == (50, task.support, 1)
    assert drawn.query_x.shape == (50, task.way * task.query, 1)
    for episode in (Episodes(*(part[i] for part in drawn)) for i in range(50)):
        x, y = episode.support_x[:, 0], episode.support_y
        length = int((y != PADDING).sum())
        way = len(y[:length].unique())
        assert y[:length].tolist() == sorted(y[:length].tolist())
        assert (y[length:] == PADDING).all() and (x[length:] == x[0]).all()
        asked = way * task.query
        expected = torch.arange(way).repeat_interleave(task.query)
        assert torch.equal(episode.query_y[:asked], expected)
        assert (episode.query_y[asked:] == PADDING).all()
        assert (episode.query_x[asked:] == x[0]).all()
        images = torch.cat([x[:length], episode.query_x[:asked, 0]])
        assert len(images.unique()) == len(images), "queries are no support examples"
        own = class_of(images)
        labels = torch.cat([y[:length], episode.query_y[:asked]])
        pairs = {(int(label), int(number)) for label, number in zip(labels, own, strict=True)}
        assert len(pairs) == way == len({number for _, number in pairs})


def test_an_uneven_task_is_part_of_the_largest_one() -> None:
    """Its classes, and the support images of each, are the first ones of the even task."""
    drawn = source(EQUAL).sample("train", 0, 20)
    largest = source(EQUAL.even()).sample("train", 0, 20)
    for i in range(20):
        for label in range(EQUAL.way):
            own = drawn.support_x[i][drawn.support_y[i] == label]
            every = largest.support_x[i][largest.support_y[i] == label]
            assert torch.equal(own, every[: len(own)])


def test_ways_and_shots_are_uniform_between_their_limits() -> None:
    count = 20_000
    drawn = draw_shots(
        uneven_of(EQUAL) or pytest.fail(), 5, torch.arange(count), torch.full((count, 6), 99), 5, 4
    )
    there = drawn > 0
    ways, shots = there.sum(1), drawn.amax(1)
    assert torch.equal(drawn, torch.where(there, shots[:, None], 0))
    assert torch.equal(there, torch.arange(6) < ways[:, None]), "the first classes are there"
    for values, least, most in ((ways, 2, 6), (shots, 2, 5)):
        found = torch.bincount(values, minlength=most + 1)
        assert found[:least].sum() == 0 and len(found) == most + 1
        expected = count / (most - least + 1)
        spread = math.sqrt(expected * (1 - 1 / (most - least + 1)))
        assert (found[least:] - expected).abs().max() < 4 * spread
    both = torch.corrcoef(torch.stack([ways, shots]).double())[0, 1]
    assert abs(both) < 4 / math.sqrt(count), "one says nothing of the other"


def by_hand(uneven: Uneven, key: int, episode: int, sizes: list[int], shot: int, q: int) -> Any:
    """The numbers of support examples of Meta-Dataset, one class at a time."""
    own = int(random_bits(key, torch.tensor(episode)))

    def number(place: int) -> float:
        return float(uniform(own, torch.tensor(place)))

    n = uneven.min_way + math.floor(number(0) * (len(sizes) - uneven.min_way + 1))
    beta = number(1)
    added = [math.floor(beta * min(shot, s - q)) + 1 for s in sizes[:n]]
    support = min(uneven.max_support, sum(added))
    weights = [
        s * math.exp(math.log(0.5) + (math.log(2) - math.log(0.5)) * number(2 + c))
        for c, s in enumerate(sizes[:n])
    ]
    own_shots = [
        min(math.floor(w / sum(weights) * (support - n)) + 1, s - q)
        for w, s in zip(weights, sizes[:n], strict=True)
    ]
    return own_shots + [0] * (len(sizes) - n)


def test_imbalanced_shots_are_those_of_the_published_formula() -> None:
    uneven = uneven_of(IMBALANCED)
    assert uneven is not None
    sizes, episodes = SIZES[:6], torch.arange(300)
    drawn = draw_shots(uneven, 7, episodes, torch.tensor(sizes).expand(300, -1), 8, 4)
    expected = [by_hand(uneven, 7, i, sizes, 8, 4) for i in range(300)]
    assert drawn.tolist() == expected
    assert 18 <= drawn.sum(1).max() <= 20, "rounding down leaves some of the largest support set"
    assert (drawn <= torch.tensor(sizes) - 4).all()
    ratio = (drawn.double().amax(1) / drawn.masked_fill(drawn == 0, 99).amin(1)).median()
    assert ratio >= 2, "classes differ"


def test_larger_classes_have_more_support_examples() -> None:
    uneven, sizes = Uneven(2, 1, True, 100), torch.tensor([20, 80]).expand(4000, -1)
    drawn = draw_shots(uneven, 3, torch.arange(4000), sizes, 60, 4).double()
    large = drawn.sum(1) > 40
    part = (drawn[:, 1] / drawn.sum(1))[large].mean()
    assert abs(part - 0.786) < 0.02  # E[4a / (4a + b)] for log a, log b uniform from log ½ to log 2


def test_a_class_may_be_too_small_for_the_shots_of_others() -> None:
    with pytest.raises(ValueError, match=r"task.shot \+ task.query = 8 \+ 4 = 12 is more than"):
        source(IMBALANCED.even())
    with pytest.raises(ValueError, match=r"a support example \+ task.query = 1 \+ 9 = 10"):
        source(TaskConfig(way=6, shot=8, query=9, imbalanced=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_way": 6}, "task.min_way=6: must be at most task.way=5"),
        ({"min_way": 1}, "2 classes or more"),
        ({"min_way": 0}, "must be from 1"),
        ({"min_shot": 2}, "task.min_shot=2: must be at most task.shot=1"),
        ({"max_support": 5}, "it is for task.imbalanced=true"),
        ({"imbalanced": True, "shot": 3, "max_support": 4}, "from task.way=5 to"),
        ({"imbalanced": True, "shot": 3, "max_support": 16}, "task.way \\* task.shot = 15"),
        ({"imbalanced": True, "min_shot": 1}, "leave it out"),
    ],
)
def test_limits_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskConfig(**settings)


def test_training_tasks_may_be_uneven_and_those_of_evaluations_not() -> None:
    task = TaskConfig(train=TrainTaskConfig(way=20, min_way=5, shot=5, min_shot=1))
    assert task.uneven is None and task.in_training().uneven == "min_way=5"
    assert task.even().in_training().uneven is None
    assert shape_of(task) == {"way": 5, "shot": 1, "query": 15}
    assert shape_of(task.in_training()) == {
        "way": 20, "shot": 5, "query": 15, "min_way": 5, "min_shot": 1,
    }  # fmt: skip
    other = TaskConfig(way=9, min_way=5, train=TrainTaskConfig(min_way=9))
    assert other.in_training().uneven is None
    with pytest.raises(
        ConfigError, match=r"task.train.min_way=5: must be at most task.train.way=3"
    ):
        TaskConfig(way=9, min_way=5, train=TrainTaskConfig(way=3)).in_training()


def test_another_way_to_draw_shots_drops_what_was_of_the_former() -> None:
    assert redrawn({"imbalanced": False}, IMBALANCED) == {"imbalanced": False, "max_support": None}
    assert redrawn({"imbalanced": True}, EQUAL) == {"imbalanced": True, "min_shot": None}
    assert redrawn({"way": 3}, EQUAL) == {"way": 3}
    train = TrainTaskConfig(imbalanced=True)
    assert TaskConfig(shot=3, min_shot=1, train=train).in_training().min_shot is None
    assert set(EVEN) == {name for name in vars(train) if name in EVEN}
