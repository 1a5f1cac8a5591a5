"""Meta-steps that the simulated accelerator launches as one graph, and the same without.

    python -m tests.simulated.graphs [case …]

A graph of it is a list of operations whose results stay where they were when they were captured,
and are garbage until they are launched. A launch does them again, on what is at those places then.
Prints a line of JSON for each case that begins so, `{case: Outcome}`.
"""

import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metarun.training.evaluation import evaluate_split
from metarun.training.loop import meta_step
from metarun.training.setup import build
from metarun.training.state import fresh
from metarun.unroll.recording.cuda_capture import WARM_UPS
from metarun.unroll.recording.graphs import CAPTURES
from tests.setups import config_of
from tests.simulated.accelerator import NAME, Operation, capturing, register
from tests.simulated.cases import MLP, REPLAY, SINE, cases
from tests.simulated.catalogue import small

META_STEPS = 3

MORE = {
    "conv4": ("data=glyphs", "task.way=3", "trainer.meta_batch=2", "backbone.width=2",
              "algo.inner_steps=2", "engine.batching=vmap", REPLAY),
    "auto": (*SINE, "trainer.steps=20"),
    "uneven chunks": (*SINE, "trainer.meta_batch=5", "engine.chunk=2", REPLAY),
    "a rate that is learned": (*SINE, "inner_opt=adam", "inner_opt.learn=[lr]", REPLAY),
    "clipped": (*SINE, "outer_opt.clip_norm=1", REPLAY),
    "newton": ("data=glyphs", *MLP, "task.way=3", "trainer.meta_batch=2", "algo=anil",
               "inner_opt=newton", REPLAY),
}  # fmt: skip
"""Runs beside those of the catalogue that are recorded."""


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        captures: graphs that were made.
        launches: how often one was launched.
        said: why something is no graph.
        same: whether meta-parameters and scores have the same bits as without graphs.
    """

    captures: int
    launches: int
    said: list[str]
    same: bool


class Counted:
    """Captures, counted."""

    def __init__(self) -> None:
        self.captures = self.launches = 0

    def captured(
        self, device: torch.device, run: Callable[[], Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """As `metarun.unroll.recording.graphs.Capture`."""
        for _ in range(WARM_UPS):
            run()
        with capturing() as operations:
            written = run()
        for operation in operations:
            for _, old in new_results(operation, operation.result):
                old.fill_(torch.nan if old.is_floating_point() else 0)
        self.captures += 1

        def launch() -> None:
            self.launches += 1
            for operation in operations:
                again = operation.func(*operation.args, **operation.kwargs)
                for new, old in new_results(operation, again):
                    old.copy_(new)

        return written, launch


def new_results(operation: Operation, again: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What an operation has given again, beside its first results: those with their own memory."""
    if (
        operation.func is torch.ops.aten.empty.memory_format
    ):  # it is filled, and perhaps made larger
        return
    given = [x for x in tree_leaves((operation.args, operation.kwargs)) if isinstance(x, Tensor)]
    places = {x.untyped_storage().data_ptr() for x in given}
    for new, old in zip(tree_leaves(again), tree_leaves(operation.result), strict=True):
        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in places:
            yield new, old


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged of programs within the block."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("metarun.training.programs")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def figures(settings: Sequence[str], device: torch.device) -> list[Tensor]:
    """The meta-parameters after some meta-steps, and the scores of two evaluations."""
    setup = build(config_of(*settings), device)
    state = fresh(setup)
    for _ in range(META_STEPS if setup.steps else 0):
        meta_step(setup, state)
    scores = [
        torch.tensor(
            evaluate_split(setup, setup.trace, state.meta, "test", 2, lambda done: None).scores
        )
        for _ in range(2)
    ]
    return [*(value.detach().cpu() for value in state.meta.values()), *scores]


def compared(settings: Sequence[str], device: torch.device) -> Outcome:
    """A case with graphs and without."""
    counted = Counted()
    with patch.dict(CAPTURES, {NAME: counted.captured}), heard() as said:
        ours = figures(settings, device)
    theirs = figures((*settings, "engine.cuda_graphs=false"), device)
    same = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    return Outcome(counted.captures, counted.launches, said, same)


def recorded_cases() -> dict[str, tuple[str, ...]]:
    """All that are recorded, and learn."""
    every = cases()
    of_catalogue = {case: every[case] for case in every if case.endswith(" recorded")}
    return of_catalogue | {f"more: {name}": settings for name, settings in MORE.items()}


def main(wanted: Sequence[str]) -> None:
    """Run the cases and print what became of them."""
    torch.set_num_threads(1)
    device = register()
    with small():
        for name, settings in recorded_cases().items():
            if not wanted or any(name.startswith(start) for start in wanted):
                print(json.dumps({name: compared(settings, device)._asdict()}), flush=True)
                gc.collect()  # recordings refer to themselves
                gc.freeze()


if __name__ == "__main__":
    main(sys.argv[1:])
