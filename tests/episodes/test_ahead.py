"""Episodes drawn ahead are those of the source, whatever the steps."""

import torch

from metarun.components.data.sinusoid import Sinusoids
from metarun.episodes import ahead
from metarun.episodes.ahead import Ahead
from metarun.episodes.source import Episodes


class Counted(Sinusoids):
    def __init__(self, query: int) -> None:
        super().__init__(shot=3, query=query, seed=1, device=torch.device("cpu"))
        self.draws: list[tuple[int, int]] = []

    def sample(self, split: str, start: int, count: int) -> Episodes:
        self.draws.append((start, count))
        return super().sample(split, start, count)


def read(source: Counted, starts: list[int], count: int) -> None:
    reader = Ahead(source, "train")
    for start in starts:
        found = reader.sample(start, count)
        for part, expected in zip(found, source.sample("train", start, count), strict=True):
            assert torch.equal(part, expected)
        source.draws.pop()


def test_small_meta_batches_are_drawn_several_at_a_time() -> None:
    source = Counted(query=2)
    read(source, list(range(0, 5 * 40, 5)), 5)
    assert source.draws == [(0, 5), (5, 5 * ahead.MOST), (5 * 33, 5 * ahead.MOST)]


def test_jumps_shares_and_other_sizes_find_their_episodes() -> None:
    source = Counted(query=2)
    read(source, [100, 0, 6, 12, 7, 5000, 3], 4)  # a resumed run, a rank's share of six
    reader = Ahead(source, "train")
    for start, count in ((0, 4), (4, 4), (8, 300), (308, 1)):
        found, expected = reader.sample(start, count), source.sample("train", start, count)
        assert torch.equal(found.query_x, expected.query_x)


def test_large_ones_are_drawn_one_at_a_time() -> None:
    source = Counted(query=ahead.LARGEST // 4)
    read(source, [0, 1, 2, 3], 1)
    assert source.draws == [(0, 1), (1, 1), (2, 1), (3, 1)]
