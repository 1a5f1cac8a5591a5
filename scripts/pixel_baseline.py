#!/usr/bin/env python3
"""How far raw pixels go: 1-shot nearest neighbour on the test tasks of an image data set.

The tasks are those that a metarun run of the same seed is tested on. Prints mean accuracy with
its 95 % confidence interval.
"""

import argparse
import os
from pathlib import Path

import torch

from metarun.components.data import glyphs, omniglot
from metarun.episodes.source import ImageEpisodes
from metarun.training.evaluation import confidence95


def main() -> None:
    """Parse the arguments, draw the tasks, print the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["glyphs", "omniglot"], default="glyphs")
    parser.add_argument("--way", type=int, default=5)
    parser.add_argument("--query", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.data == "glyphs":
        stores = glyphs.load()
    else:
        root = os.environ.get("METARUN_DATA")
        stores = omniglot.load(Path(root) if root else None, download=True)
    source = ImageEpisodes(
        stores,
        way=options.way,
        shot=1,
        query=options.query,
        seed=options.seed,
        device=torch.device("cpu"),
    )
    accuracies = []
    for index in range(options.episodes):
        support_x, support_y, query_x, query_y = (x[0] for x in source.sample("test", index, 1))
        distances = torch.cdist(query_x.flatten(1), support_x.flatten(1))
        accuracies.append((support_y[distances.argmin(dim=1)] == query_y).double().mean())
    scores = torch.stack(accuracies)
    print(
        f"{options.data}, {options.way}-way 1-shot, raw pixels: {100 * scores.mean():.1f} ± "
        f"{100 * confidence95(scores):.1f} % (95 % CI; {options.episodes} tasks, "
        f"{options.query} queries a class)"
    )


if __name__ == "__main__":
    main()
