"""Which classes are taken for which: counts over many tasks."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.episodes.source import ImageEpisodes
from metarun.errors import printable_name
from metarun.reporting.table import as_csv

PAIRS = 1000  # that a result holds; the table has all
SHOWN = 5


class Confusion(NamedTuple):
    """Counts of queries by their class and by the class that they were taken for.

    Attributes:
        names: of the classes.
        counts: int64 (classes, classes), queries of the first that were taken for the second.
        met: int64 (classes, classes), queries of the first in tasks that have the second.
    """

    names: tuple[str, ...]
    counts: Tensor
    met: Tensor

    @property
    def queries(self) -> Tensor:
        """Queries of each class, int64 (classes,)."""
        return self.counts.sum(1)

    @property
    def accuracy(self) -> Tensor:
        """Of each class, float64 (classes,); NaN where no task had it."""
        return self.counts.diagonal().double() / self.queries

    def pairs(self) -> list[tuple[int, int]]:
        """Class and what it was taken for, the most frequent pair first."""
        wrong = self.counts.clone()
        wrong.fill_diagonal_(0)
        first, second = wrong.nonzero(as_tuple=True)
        order = wrong[first, second].sort(descending=True, stable=True).indices
        return list(zip(first[order].tolist(), second[order].tolist(), strict=True))


def count_confusion(
    source: ImageEpisodes, split: str, found: Iterable[tuple[Tensor, Tensor]]
) -> Confusion:
    """Count what the queries of tasks are taken for.

    Args:
        source: of the tasks.
        split: of the tasks.
        found: the scores and the labels of tasks 0, 1, …, as `each_task` gives them.
    """
    names = source.stores[split].class_names
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    met = torch.zeros_like(counts)
    for index, (scores, labels) in enumerate(found):
        classes = source.classes(split, index, 1)[0].cpu()
        true, taken = classes[labels], classes[scores.argmax(-1)]
        one = torch.ones_like(true)
        counts.index_put_((true, taken), one, accumulate=True)
        met.index_put_((true[:, None], classes[None]), one[:, None], accumulate=True)
    return Confusion(names, counts, met)


def plain(found: Confusion) -> dict[str, Any]:
    """The counts as plain values: of each class, and of the pairs that are confused most."""
    seen = found.queries.nonzero()[:, 0].tolist()
    accuracy, pairs = found.accuracy, found.pairs()
    worst = dict(reversed(pairs))  # of each class what it is taken for most often

    def mistake(one: int, other: int) -> dict[str, Any]:
        queries, of = int(found.counts[one, other]), int(found.met[one, other])
        return {"taken_for": found.names[other], "queries": queries, "of": of}

    return {
        "classes": {
            found.names[c]: {
                "queries": int(found.queries[c]),
                "accuracy": float(accuracy[c]),
                "mistake": mistake(c, worst[c]) if c in worst else None,
            }
            for c in seen
        },
        "pairs": [
            {"class": found.names[one], **mistake(one, other)} for one, other in pairs[:PAIRS]
        ],
    }


def as_table(found: Confusion) -> str:
    """All pairs that have met as CSV, right ones too."""
    first, second = found.met.nonzero(as_tuple=True)
    rows = [
        [found.names[a], found.names[b], int(found.counts[a, b]), int(found.met[a, b])]
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return as_csv(["class", "taken_for", "queries", "of"], rows)


def lines(figures: dict[str, Any], tasks: int) -> list[str]:
    """What a person reads of `plain`'s figures."""
    classes = sorted(figures["classes"].items(), key=lambda item: item[1]["accuracy"])
    told = [f"{printable_name(name)} {100 * own['accuracy']:.1f} %" for name, own in classes]
    shown = told if len(told) <= 2 * SHOWN else [*told[:SHOWN], "…", *told[-SHOWN:]]
    pairs = [
        f"{printable_name(pair['class'])} for {printable_name(pair['taken_for'])} "
        f"({pair['queries']} of {pair['of']} queries)"
        for pair in figures["pairs"][:SHOWN]
    ]
    return [
        f"classes by accuracy, over {tasks:,} tasks: {', '.join(shown)}",
        f"taken for another: {', '.join(pairs) if pairs else 'none'}",
    ]
