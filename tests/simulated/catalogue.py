"""Meta-steps and evaluations of the whole catalogue on the simulated accelerator.

    python -m tests.simulated.catalogue [case …]

Prints a line of JSON for each case that begins so, `{case: Outcome}`.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from metarun.components.backbone import conv4
from metarun.components.data import lake, omniglot
from metarun.config.catalogue import builder, schemas
from metarun.config.component import as_keywords
from metarun.episodes import store
from metarun.episodes.reordered import Reordered
from metarun.episodes.store import from_equal_classes
from metarun.training.evaluation import evaluate_split
from metarun.training.loop import meta_step
from metarun.training.setup import Setup, build
from metarun.training.state import TrainState, fresh
from metarun.unroll.recording.recorded import _Made
from tests.setups import config_of
from tests.simulated.accelerator import Event, register, watched
from tests.simulated.cases import cases

UNCOMPARED = patch.object(_Made, "due", lambda self: False)
"""Recordings are not compared with their functions, which takes longer than all the rest."""

AROUND: dict[str, AbstractContextManager[Any]] = {
    "recordings compared": nullcontext(),
    "images on the CPU": patch.object(store, "free_memory", lambda device: 0),
}
"""What a case is run in, where it is not `UNCOMPARED`."""


class Outcome(NamedTuple):
    """What a case did.

    Attributes:
        first: what happened in its first meta-step and in its first evaluation: "file:function
            operation" of each place.
        later: the same of all later meta-steps.
        evaluation: the same of a later evaluation.
        error: how it ended, if it did not run through.
        seconds: how long it took.
    """

    first: list[str]
    later: list[str]
    evaluation: list[str]
    error: str | None
    seconds: float


@contextmanager
def small() -> Iterator[None]:
    """Half of conv4, and pictures of the data sets whose files are not here."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (12, 8, 3, 12, 12), generator=generator, dtype=torch.uint8)
    of_a_split = from_equal_classes(pictures, [f"g{i % 2}/c{i}" for i in range(12)])
    drawings = torch.randint(0, 256, (400, 2, 1, 28, 28), generator=generator, dtype=torch.uint8)
    runs = [f"run{i // 20:02}/class{i % 20:02}" for i in range(400)]
    many = torch.zeros(50, 20, 1, 28, 28, dtype=torch.uint8)  # for all parts of labelled examples
    classes = from_equal_classes(many, [f"c{number}" for number in range(50)])
    given = dict.fromkeys(("train", "val", "test"), of_a_split)
    with ExitStack() as stack:
        stack.enter_context(patch.object(conv4, "BLOCKS", 2))
        stack.enter_context(patch.object(omniglot, "characters", lambda *_, **__: classes))
        for name, schema in schemas("data").items():
            module = sys.modules[builder("data", name).__module__]
            if needs_files(schema) and hasattr(module, "load"):
                stack.enter_context(patch.object(module, "load", lambda *_, **__: given))
        lakes = from_equal_classes(drawings, runs)
        stack.enter_context(patch.object(lake, "load", lambda own: lakes))
        yield


def needs_files(schema: type) -> bool:
    """Whether a data set is read from files."""
    return "root" in {field.name for field in fields(schema)} and schema.__name__ != "MultiConfig"


def run(
    settings: Sequence[str],
    device: torch.device,
    tested: Callable[[Setup], Setup] = lambda setup: setup,
) -> Outcome:
    """Build, take meta-steps and evaluate.

    Args:
        settings: of a command line.
        device: the simulated one.
        tested: gives what is evaluated, from the set-up that was trained.
    """
    start = time.process_time()
    first: list[Event] = []
    later: list[Event] = []
    evaluation: list[Event] = []
    error = None
    try:
        setup = build(config_of(*settings), device)
        state = fresh(setup)
        if setup.steps:
            with watched() as first:
                meta_step(setup, state)
            with watched() as later:
                meta_step(setup, state)
        setup_of_test = tested(setup)
        with watched() as again:
            evaluated(setup_of_test, state)
        first += again
        with watched() as evaluation:
            evaluated(setup_of_test, state)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}".partition("\n")[0][:500]
    seconds = round(time.process_time() - start, 3)
    return Outcome(*map(places, (first, later, evaluation)), error, seconds)


def on_lake(setup: Setup) -> Setup:
    """The set-up of a run that is tested on Lake's tasks."""
    given = config_of("data=lake")
    build_lake, options = builder("data", "lake"), as_keywords(given.data)
    source = build_lake(given.task, 0, setup.device, torch.float32, **options)
    return replace(setup, source=source)


def in_another_order(setup: Setup) -> Setup:
    """The set-up of a run that is tested with other labels for the classes of each task."""
    return replace(setup, source=Reordered(setup.source, 1))


TESTED = {"data=lake": on_lake, "classes in another order": in_another_order}
"""What is evaluated, where it is not the source of the run."""


def evaluated(setup: Setup, state: TrainState) -> None:
    """Score two tasks of the test."""
    evaluate_split(setup, setup.trace, state.meta, "test", 2, lambda done: None)


def places(events: Sequence[Event]) -> list[str]:
    """Where something happened, each place once."""
    return sorted({f"{e.what} {e.place} {e.operation}" for e in events})


def main(wanted: Sequence[str]) -> None:
    """Run the cases and print what happened."""
    torch.set_num_threads(1)
    device = register()
    with small():
        for name, settings in cases().items():
            if not wanted or any(name.startswith(start) for start in wanted):
                more = (TESTED[name],) if name in TESTED else ()
                with AROUND.get(name, UNCOMPARED):
                    print(json.dumps({name: run(settings, device, *more)._asdict()}), flush=True)
                gc.collect()  # recordings refer to themselves
                gc.freeze()  # what this case has imported, which is not to be looked through again


if __name__ == "__main__":
    main(sys.argv[1:])
