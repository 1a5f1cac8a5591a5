"""Tasks with other labels."""

from collections import Counter

import torch
from torch import Tensor

from metarun.episodes.reordered import Reordered
from tests.setups import IMAGES, setup_of

TASK = (*IMAGES, "task.way=3", "task.shot=2", "task.query=3")


def blocks(x: Tensor) -> list[list[Tensor]]:
    """Task -> the examples of each class."""
    return [list(task.unflatten(0, (3, -1))) for task in x]


def test_each_class_moves_as_a_whole() -> None:
    source = setup_of("algo=protonet", *TASK).source
    plain = source.sample("test", 4, 3)
    other = Reordered(source, 1).sample("test", 4, 3)
    assert torch.equal(plain.support_y, other.support_y)
    assert torch.equal(plain.query_y, other.query_y)
    moved = 0
    for before, after, queries, later in zip(
        *(blocks(x) for x in (plain.support_x, other.support_x, plain.query_x, other.query_x)),
        strict=True,
    ):
        order = [next(i for i, x in enumerate(before) if torch.equal(x, y)) for y in after]
        assert sorted(order) == [0, 1, 2]
        assert all(torch.equal(queries[i], later[place]) for place, i in enumerate(order))
        moved += order != [0, 1, 2]
    assert moved


def test_an_order_is_of_its_number_and_its_task_alone() -> None:
    source = setup_of("algo=protonet", *TASK).source
    whole = Reordered(source, 2).sample("test", 0, 6).query_x
    assert torch.equal(whole[3:5], Reordered(source, 2).sample("test", 3, 2).query_x)
    assert not torch.equal(whole, Reordered(source, 3).sample("test", 0, 6).query_x)


def test_all_orders_are_as_likely() -> None:
    source = setup_of("algo=protonet", *TASK).source
    plain, count = source.sample("test", 0, 1).support_x, 600
    tasks = plain.expand(count, *plain.shape[1:])

    class Same:
        input_shape, outputs, kind = source.input_shape, source.outputs, source.kind

        def sample(self, split: str, start: int, count: int) -> object:
            return source.sample(split, 0, 1)._replace(support_x=tasks, query_x=tasks)

    found = Reordered(Same(), 1).sample("test", 0, count).support_x[:, ::2]
    orders = Counter(
        tuple(int((one == plain[0, ::2]).flatten(1).all(1).nonzero()[0, 0]) for one in task)
        for task in found
    )
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 on average, deviation 9
