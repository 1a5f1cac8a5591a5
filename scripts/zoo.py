#!/usr/bin/env python3
"""One table, equal budget: every classification method, each trained for the same time.

Nothing in a run limits it by time. So each method is first started for a few meta-steps, which are
timed once they are recorded. The number that fits into the budget is kept in `--out/plan.json`, so
that the same command, given again, goes on with the same runs: finished ones are recalled,
interrupted ones resume. Validations and the test come on top of the budget.

Runs are in `--out/<setting>/<method>/s<seed>`. The tables are written to `--out/zoo.md` and, with
more figures, to `--out/zoo.json`. Rows are ordered by validation scores; test scores choose
nothing, and no setting below was chosen by them.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any, NamedTuple

import torch

from metarun.components.algo.one_model import OneModelConfig
from metarun.config.catalogue import components
from metarun.config.compose import composed, register_schemas
from metarun.errors import ConfigError, MetarunError
from metarun.reporting.gather import Run, read_run
from metarun.reporting.groups import Group, boards
from metarun.reporting.table import Cell, as_markdown, score_text, with_interval
from metarun.rundir.directory import finished_result
from metarun.system.files import write_json, write_text
from metarun.system.untrusted import json_object
from metarun.training.setup import build, to_plain

VALIDATIONS = 6  # of a run, the last of them at its end
WARM_UP = 4  # meta-steps before the timed ones: two as Python runs them, the recording, a replay
FEWEST_TIMED = 3
LOG_EVERY = 20
BLOCK = "zoo"

TASKS = {
    "5w1s": ("task.way=5", "task.shot=1", "task.query=5"),
    "20w5s": ("task.way=20", "task.shot=5", "task.query=5"),
}

# ------------------------------------------------------------------------------- the methods


class Method(NamedTuple):
    """A row of the table, in words, and how the method is usually run.

    Attributes:
        learns: what it meta-learns.
        adapts: how it adapts to a task.
        both: settings in all of `TASKS`; "{tenth}" is a tenth of the meta-steps.
        own: further ones of each.
    """

    learns: str
    adapts: str
    both: tuple[str, ...] = ()
    own: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 (never changed)


# Tasks in a meta-step of what adapts by inner steps. 20-way 5-shot has seven times the examples in
# a task, so fewer tasks; papers have 16 in both, and weeks of time.
MANY = {"5w1s": ("trainer.meta_batch=16",), "20w5s": ("trainer.meta_batch=4",)}
# Finn et al. 2017: 0.4 is the rate of a loss summed over classes, as per_shot has it; one step
# in 5-way tasks, and 5 of 0.1 in 20-way ones.
FINN_PER_SHOT = {
    "5w1s": ("trainer.meta_batch=16", "algo.reduction=per_shot", "inner_opt.lr=0.4"),
    "20w5s": (
        "trainer.meta_batch=4",
        "algo.reduction=per_shot",
        "inner_opt.lr=0.1",
        "algo.inner_steps=5",
        "algo.eval_inner_steps=5",
    ),
}
# The same with 0.4 of a mean, as experiment=omniglot_5w1s_quick; 20-way: 0.1 of a sum is 2 of a
# mean, of which a fifth as well.
FINN = {
    "5w1s": ("trainer.meta_batch=16", "inner_opt.lr=0.4"),
    "20w5s": (
        "trainer.meta_batch=4",
        "inner_opt.lr=0.4",
        "algo.inner_steps=5",
        "algo.eval_inner_steps=5",
    ),
}
# Episodes of training with more classes than those of a test (Snell et al. 2017: 60), so one of
# them makes a meta-step. With as many shots as the test, and 5 queries.
WIDE = ("task.train.way=60", "trainer.meta_batch=1")
# Chen et al. 2019: Adam, batches of 16; the new head by 100 steps of 4 examples.
NEW_HEAD = (
    "trainer.meta_batch=1",
    "algo.inner_batch=4",
    "inner_opt.lr=0.01",
    "inner_opt.momentum=0.9",
    "inner_opt.dampening=0.9",
    "inner_opt.weight_decay=0.001",
)

METHODS = {
    "maml": Method("all weights", "gradient steps on all weights", own=FINN),
    "anil": Method("all weights", "gradient steps on the head", own=FINN_PER_SHOT),
    # Their extractor's rate on CIFAR-FS; one step.
    "boil": Method("all weights", "gradient steps on the body", ("inner_opt.lr=0.5",), own=MANY),
    # 5 steps of 0.1, 8 tasks; losses of all steps in the first tenth of training, as in the code.
    "maml_pp": Method(
        "all weights; a rate, γ and β for each step",
        "gradient steps on all weights",
        ("inner_opt.lr=0.1", "algo.multi_step_loss={tenth}"),
        {"5w1s": ("trainer.meta_batch=8",), "20w5s": ("trainer.meta_batch=4",)},
    ),
    # Rates begin between 0.005 and 0.1, which the algorithm has by default.
    "meta_sgd": Method(
        "all weights, a rate for each", "one gradient step on all weights", own=MANY
    ),
    "meta_curvature": Method(
        "all weights, a map of the gradients", "gradient steps on all weights", own=FINN
    ),
    # The commands of their Omniglot experiments: 16 steps of 0.1.
    "imaml": Method(
        "all weights, implicitly",
        "gradient steps, kept near the start",
        ("inner_opt.lr=0.1",),
        own=MANY,
    ),
    "sharp_maml": Method(
        "all weights, in flat places",
        "gradient steps on all weights",
        own={
            "5w1s": (*FINN["5w1s"], "algo.eval_inner_steps=3"),
            "20w5s": FINN["20w5s"],
        },
    ),
    # First order, 35 steps of 0.1 or, 5-shot, 0.25; 2 tasks.
    "sparse_maml": Method(
        "all weights, and which of them adapt",
        "gradient steps on those",
        ("trainer.meta_batch=2",),
        {"5w1s": ("inner_opt.lr=0.1",), "20w5s": ("inner_opt.lr=0.25",)},
    ),
    # From random weights in their code: 6 steps of 0.311 (Triantafillou et al. 2020).
    "proto_maml": Method(
        "all weights but the head",
        "class means as the head, then gradient steps",
        ("inner_opt.lr=0.3", "algo.inner_steps=6"),
        own=MANY,
    ),
    # 5 or, 5-shot, 20 steps of 0.1, from a pretrained network. Here it begins at random weights,
    # of which steps of 0.1 would leave the zero head untouched: so 0.4, as of MAML.
    "unicorn_maml": Method(
        "all weights but the head",
        "gradient steps from a head of zeros",
        ("inner_opt.lr=0.4", "algo.temperature=0.5"),
        own=MANY,
    ),
    # Their commands: Adam without momentum, minibatches of 10 or 20 of ten drawings a class, 5 or
    # 10 steps, 5 tasks, an outer step of the whole way; 50 steps of 5 or 10 examples in tests.
    "reptile": Method(
        "all weights",
        "Adam steps on all weights",
        (
            "inner_opt=adam",
            "inner_opt.beta1=0",
            "outer_opt=sgd",
            "outer_opt.lr=1",
            "outer_opt.schedule=cosine",
            "trainer.meta_batch=5",
            "task.train.shot=10",
        ),
        {
            "5w1s": ("inner_opt.lr=0.001", "algo.inner_batch=10", "algo.inner_steps=5"),
            "20w5s": ("inner_opt.lr=0.0005", "algo.inner_batch=20", "algo.inner_steps=10"),
        },
    ),
    # 100 context parameters, 2 steps of 1: the defaults.
    "cavia": Method("all weights", "gradient steps on a context", own=MANY),
    "protonet": Method("an embedding", "class means", WIDE),
    # Factor and ReLU of Chen et al. 2019: cosines alone cannot make a confident softmax.
    "matchingnet": Method(
        "an embedding",
        "attention over the examples",
        ("algo.scale=100", "algo.relu=true"),
        own=MANY,
    ),
    # An episode, 19 or (20-way) 10 queries a class, norms clipped at 0.5.
    "relationnet": Method(
        "an embedding and a comparison",
        "comparison with each class",
        ("trainer.meta_batch=1", "outer_opt.clip_norm=0.5"),
        {"5w1s": ("task.train.query=19",), "20w5s": ("task.train.query=10",)},
    ),
    # 20-way episodes, Adam of 5e-3 (CIFAR-FS). Their λ of 50 is for thousands of features, and
    # leaves little of a head on the 64 of conv4 (49 % of 5-way 1-shot validation tasks after 48
    # meta-steps, and 83 % with 1).
    "r2d2": Method(
        "an embedding",
        "ridge regression",
        ("task.train.way=20", "outer_opt.lr=0.005", "algo.ridge=1", "trainer.meta_batch=2"),
    ),
    # 5-shot training for all tests (CIFAR-FS), 6 queries, 8 tasks, SGD with Nesterov momentum.
    "metaoptnet": Method(
        "an embedding",
        "a support vector machine",
        (
            "task.train.shot=5",
            "task.train.query=6",
            "outer_opt=sgd",
            "outer_opt.lr=0.1",
            "outer_opt.momentum=0.9",
            "outer_opt.nesterov=true",
            "outer_opt.weight_decay=0.0005",
        ),
        {"5w1s": ("trainer.meta_batch=8",), "20w5s": ("trainer.meta_batch=2",)},
    ),
    # Adam of 1e-3, single tasks.
    "dkt": Method("an embedding and a kernel", "a Gaussian process", ("trainer.meta_batch=1",)),
    # Their commands for four blocks, which begin at a pretrained network; here all is learned.
    "feat": Method(
        "an embedding and self-attention",
        "class means, adapted to each other",
        own={
            "5w1s": MANY["5w1s"],
            "20w5s": (
                *MANY["20w5s"],
                "algo.balance=0.1",
                "algo.temperature=32",
                "algo.contrast_temperature=64",
            ),
        },
    ),
    # Its second stage alone, so with Adam of 1e-3 and not the small steps behind pre-training.
    "meta_baseline": Method("an embedding", "class means, by cosines", ("trainer.meta_batch=4",)),
    "baseline": Method("a classifier", "a new linear head", NEW_HEAD),
    "baseline_pp": Method("a classifier by cosines", "a new head of cosines", NEW_HEAD),
    # Batches of 256, as in both papers.
    "simpleshot": Method(
        "a classifier",
        "centred class means",
        ("trainer.meta_batch=1", "algo.batch_size=256"),
    ),
    "transductive_finetuning": Method(
        "a classifier",
        "Adam steps on all weights, queries too",
        (
            "trainer.meta_batch=1",
            "algo.batch_size=256",
            "inner_opt=adam",
            "inner_opt.lr=0.00005",
        ),
    ),
    "scratch": Method("nothing", "gradient steps from random weights", ("inner_opt.lr=0.1",)),
    "nearest_neighbour": Method("nothing", "the nearest example, in pixels"),
}


# ---------------------------------------------------------------------------------- the plan


class Kind(NamedTuple):
    """What the catalogue says of an algorithm."""

    classifies: bool
    learns: bool


def kind_of(name: str) -> Kind:
    """Ask an algorithm whether it can tell classes apart, and whether it takes meta-steps.

    It is refused for classes and taken for a regression: then it does only the latter. One that
    is refused for both keeps its row, so that its run can say what is wrong. What trains one model
    solves no tasks.
    """
    if issubclass(components("algo")[name].schema, OneModelConfig):
        return Kind(False, True)
    try:
        algorithm = _built(name, "data=glyphs", "backbone=conv4", "backbone.width=1")
    except (MetarunError, ValueError):
        try:
            _built(name, "data=sinusoid", "backbone=mlp")
        except (MetarunError, ValueError):
            return Kind(True, True)
        return Kind(False, True)
    return Kind(True, algorithm.learns)


def _built(name: str, *settings: str) -> Any:
    register_schemas()
    config = composed("train", [f"algo={name}", *settings])
    return build(config, torch.device("cpu")).algorithm


def steps_for(budget: float, seconds_per_step: float) -> int:
    """Meta-steps that take `budget` seconds, to two digits; a multiple of `VALIDATIONS`."""
    steps = budget / seconds_per_step
    digit = 10 ** max(0, math.floor(math.log10(max(steps, 1))) - 1)
    rounded = round(steps / digit) * digit
    return max(VALIDATIONS, round(rounded / VALIDATIONS) * VALIDATIONS)


@dataclass(frozen=True)
class Options:
    """What a plan was made for; a plan of others is refused.

    Attributes:
        compile: `engine.compile` of all runs. Replayed recordings begin at once, so that no part of
            the budget, or of the time beside it, is the compiler's.
    """

    minutes: float
    episodes: int
    val_episodes: int
    width: int
    data: str
    compile: str


class Plan:
    """The chosen meta-steps by setting and method, kept in a file."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options
        stored = json_object(path)
        if stored and stored.get("options") != vars(options):
            given = ", ".join(
                f"{key} {stored['options'].get(key)} and not {value}"
                for key, value in vars(options).items()
                if stored["options"].get(key) != value
            )
            raise ConfigError(f"{path} is of another plan ({given}): choose another --out")
        self.entries: dict[str, dict[str, Any]] = stored.get("runs", {})
        self._lock = threading.Lock()

    def steps(self, setting: str, method: str) -> int | None:
        """Meta-steps of a method; None: not measured yet."""
        entry = self.entries.get(f"{setting}/{method}")
        return None if entry is None else int(entry["steps"])

    def step_seconds(self, setting: str) -> dict[str, float]:
        """Seconds of a meta-step of each method that has been measured in a setting."""
        return {
            method: float(entry["seconds_per_step"])
            for key, entry in self.entries.items()
            for found, _, method in [key.partition("/")]
            if found == setting
        }

    def put(self, setting: str, method: str, seconds_per_step: float) -> None:
        """Keep a measurement, and what it means for the number of meta-steps."""
        steps = steps_for(60 * self.options.minutes, seconds_per_step)
        with self._lock:
            self.entries[f"{setting}/{method}"] = {
                "seconds_per_step": seconds_per_step,
                "steps": steps,
            }
            write_json(self.path, {"options": vars(self.options), "runs": self.entries})


def settings_of(setting: str, method: str, options: Options, steps: int) -> list[str]:
    """The settings of a run of so many meta-steps, without its seed and its directory."""
    own = METHODS[method]
    every = max(1, math.ceil(steps / VALIDATIONS))
    usual = [
        text.format(tenth=max(1, steps // 10)) for text in (*own.both, *own.own.get(setting, ()))
    ]
    return [
        f"algo={method}",
        f"data={options.data}",
        "backbone=conv4",
        f"backbone.width={options.width}",
        *TASKS[setting],
        *usual,
        f"engine.compile={options.compile}",
        "device=cpu",
        f"trainer.steps={steps}",
        f"trainer.eval_every={every}",
        f"trainer.checkpoint_every={every}",
        f"trainer.log_every={min(LOG_EVERY, every)}",
        f"trainer.eval_episodes={options.val_episodes}",
        f"trainer.test_episodes={options.episodes}",
    ]


# ------------------------------------------------------------------------------ the processes

_running: set[Popen[bytes]] = set()
_composing = threading.Lock()


@contextmanager
def started(settings: Sequence[str], directory: Path) -> Iterator[Popen[bytes]]:
    """A process of `metarun train` with one thread, whose output goes beside its directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "metarun", "train", *settings, f"hydra.run.dir={directory}"]
    with open(directory.with_suffix(".log"), "wb") as log:
        process = Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=DEVNULL,
            stdout=log,
            stderr=STDOUT,
            # Else Ctrl-C would reach it twice, and the second time ends it without a checkpoint.
            start_new_session=True,
        )
        _running.add(process)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # it saves a checkpoint first
                process.wait()
            _running.discard(process)


def last_words(directory: Path) -> str:
    """The last line that a run wrote, which of a failed one is its error."""
    text = directory.with_suffix(".log").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("metarun: ")]
    return (errors or lines or ["it wrote nothing"])[-1]


def measure(settings: Sequence[str], directory: Path, at_least: float) -> float:
    """Seconds of a meta-step, from a run that is stopped after a while.

    Args:
        at_least: seconds of meta-steps to look at.

    Raises:
        MetarunError: the run fails.
    """
    # A new run each time: a resumed one would be recorded in the middle of what is timed.
    shutil.rmtree(directory, ignore_errors=True)
    times: list[float] = []
    with started([*settings, "trainer.log_every=1"], directory) as process:
        while (code := process.poll()) is None:
            time.sleep(0.05)
            with suppress(OSError, ValueError):  # not there yet, or in the middle of being written
                times = [seconds for _, seconds in logged(read_run(directory))][WARM_UP:]
            if len(times) >= FEWEST_TIMED and sum(times) >= at_least:
                break
    if len(times) < FEWEST_TIMED:
        raise MetarunError(f"exit code {code}: {last_words(directory)}")
    shutil.rmtree(directory)
    # The lower quartile: where others need the machine as well, a method that is measured at a bad
    # moment would get fewer meta-steps than the rest. It is much the same on a quiet one.
    return sorted(times)[len(times) // 4]


def logged(run: Run) -> list[tuple[int, float]]:
    """For each line of a run's log: meta-steps since the last one, and the seconds of each.

    Validations are left out.
    """
    batch, found, before = run.settings["trainer.meta_batch"], [], 0
    for entry in run.log:
        if speed := entry.get("time/tasks_per_s"):
            found.append((entry["step"] - before, batch / speed))
            before = entry["step"]
    return found


def train(settings: Sequence[str], directory: Path) -> str:
    """Run, resume or recall one run; says which.

    Raises:
        MetarunError: it failed.
    """
    with _composing:  # Hydra can do it once at a time
        register_schemas()
        config = composed("train", list(settings))
    if finished_result(directory, to_plain(config)) is not None:
        return "recalled"
    with started(settings, directory) as process:
        code = process.wait()
    if code == 130:
        raise MetarunError("interrupted; the same command goes on")
    if code:
        raise MetarunError(f"exit code {code}: {last_words(directory)}")
    return "done"


# ---------------------------------------------------------------------------------- the table


class Row(NamedTuple):
    """A method in one setting.

    Attributes:
        steps: meta-steps taken.
        step_seconds: of one, as the plan has it: not what a busy machine took in the end.
        test_seconds: for a task of the test, in the run where that was least.
    """

    method: str
    group: Group
    steps: int
    step_seconds: float
    test_seconds: float


def rows_of(directories: Iterable[Path], step_seconds: Mapping[str, float]) -> list[Row]:
    """The rows of one setting, best validation score first.

    Args:
        directories: of the runs.
        step_seconds: of a method's meta-step, for those that take any.

    Raises:
        ValueError: a run cannot be read, or its tasks are not those of the others.
    """
    runs = [run for run in map(read_run, directories) if run.test is not None]
    if not runs:
        return []
    found, _ = boards(runs)
    if len(found) > 1:
        raise ValueError(f"scores of different tasks: {'; '.join(b.title for b in found)}")
    return [_row(group, step_seconds) for group in found[0].groups]


def _row(group: Group, step_seconds: Mapping[str, float]) -> Row:
    results = [json_object(run.directory / "result.json") for run in group.runs]
    method = str(group.settings["algo.name"])
    return Row(
        method,
        group,
        max(int(result["steps"]) for result in results),
        step_seconds.get(method, 0.0),
        min(float(r["test_seconds"]) / int(r["test"]["episodes"]) for r in results),
    )


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of one setting's rows."""
    over = " or ".join(dict.fromkeys(row.group.interval for row in rows))
    header = [
        "method", "what it learns", "how it adapts", "meta-steps", "one of them",
        f"test accuracy (95 % CI over {over})", "best validation", "test, per task",
    ]  # fmt: skip
    cells = []
    for row in rows:
        words, group = METHODS[row.method], row.group
        cells.append(
            [
                Cell(row.method, row.method),
                Cell(words.learns, words.learns),
                Cell(words.adapts, words.adapts),
                Cell(f"{row.steps:,}" if row.steps else "–", row.steps),
                Cell(f"{row.step_seconds:.2g} s" if row.steps else "–", row.step_seconds),
                Cell(with_interval(group.score, group.value, group.ci95), group.value),
                Cell(score_text(group.score, group.validation), group.validation),
                Cell(f"{row.test_seconds:.2g} s", row.test_seconds),
            ]
        )
    return as_markdown(header, cells)


def minutes_text(options: Options) -> str:
    """The budget in words."""
    return f"{options.minutes:g} minute{'s' * (options.minutes != 1)}"


def markdown(tables: dict[str, list[Row]], options: Options) -> str:
    """The tables of all settings, with what they have in common."""
    lines = [
        f"Each method took as many meta-steps as fit into {minutes_text(options)} of one CPU "
        "thread, by the time of one that was measured first; validations come on top. The backbone "
        f"is conv4 of width {options.width}. {options.episodes} test tasks for each seed, queries "
        "normalised together. Rows are in the order of the validation score."
    ]
    for setting, rows in tables.items():
        if rows:
            way, shot = (text.partition("=")[2] for text in TASKS[setting][:2])
            lines += ["", f"**{options.data}, {way}-way {shot}-shot**", "", *table(rows)]
    return "\n".join(lines) + "\n"


def as_json(tables: dict[str, list[Row]], options: Options) -> dict[str, Any]:
    """The figures in full, run by run."""
    found = {
        setting: [
            {
                "method": row.method,
                "meta_steps": row.steps,
                "seconds_per_meta_step": row.step_seconds,
                "test_accuracy": row.group.value,
                "ci95": row.group.ci95,
                "ci95_over": row.group.interval,
                "best_validation": row.group.validation,
                "test_seconds_per_task": row.test_seconds,
                "runs": [_figures(run) for run in row.group.runs],
            }
            for row in rows
        ]
        for setting, rows in tables.items()
    }
    return {"options": vars(options), "settings": found}


def _figures(run: Run) -> dict[str, Any]:
    assert run.test is not None
    return {
        "seed": run.seed,
        "directory": str(run.directory),
        "test_accuracy": run.test.value,
        "ci95_over_tasks": run.test.ci95,
        "best_validation": run.test.validation,
        "code": ", then ".join(run.codes),
    }


def put_into(page: Path, text: str, block: str = BLOCK) -> None:
    """Replace what is between the marks of a page.

    Args:
        block: the name in the marks, since a page may have several tables.

    Raises:
        ConfigError: they are not there once each, in this order.
    """
    old = page.read_text(encoding="utf-8")
    begins, ends = marks(block)
    before, start, rest = old.partition(begins)
    _, end, after = rest.partition(ends)
    if not start or not end or (old.count(begins), old.count(ends)) != (1, 1):
        raise ConfigError(f"{page} needs one line {begins} and, below it, one line {ends}")
    write_text(page, f"{before}{begins}\n{text.strip()}\n{ends}{after}")


def marks(block: str) -> tuple[str, str]:
    """The lines around a table in a page."""
    return f"<!-- {block} -->", f"<!-- /{block} -->"


# ----------------------------------------------------------------------------------- the whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, train, write the tables."""
    given = parser().parse_args(arguments)
    try:
        return zoo(given)
    except ConfigError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _as_ctrl_c(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--minutes", type=float, default=6.0, help="of training, for each run")
    made.add_argument("--seeds", type=int, default=3, help="how many")
    made.add_argument("--methods", help="names with commas between; default: all that classify")
    made.add_argument("--settings", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    made.add_argument("--episodes", type=int, default=600, help="test tasks of each run")
    made.add_argument("--val-episodes", type=int, default=100, help="tasks of a validation")
    made.add_argument("--width", type=int, default=64, help="of conv4")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    made.add_argument("--out", default="outputs/zoo")
    made.add_argument("--data", choices=["omniglot", "glyphs"], default="omniglot")
    made.add_argument("--compile", choices=["replay", "none", "inductor"], default="replay")
    made.add_argument("--markdown-into", metavar="PAGE", help="put the tables between its marks")
    made.add_argument("--block", default=BLOCK, help="the name in these marks")
    return made


def zoo(given: argparse.Namespace) -> int:
    """All of it; the exit status.

    Raises:
        ConfigError: an option is wrong.
    """
    if given.minutes <= 0 or min(given.seeds, given.jobs, given.episodes, given.val_episodes) < 1:
        raise ConfigError("--minutes, --seeds, --jobs and the numbers of tasks must be positive")
    options = Options(
        given.minutes, given.episodes, given.val_episodes, given.width, given.data, given.compile
    )
    out = Path(given.out).absolute()
    settings = chosen(given.settings.split(","), TASKS, "--settings")
    names = list(components("algo"))
    methods = chosen(given.methods.split(",") if given.methods else names, names, "--methods")
    kinds = {name: kind_of(name) for name in methods}
    if given.methods and (others := [name for name in methods if not kinds[name].classifies]):
        raise ConfigError(f"--methods: {', '.join(others)} cannot tell classes apart")
    methods = [name for name in methods if kinds[name].classifies]
    if lacking := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"{', '.join(lacking)}: give METHODS in {__file__} a row for it")
    plan = Plan(out / "plan.json", options)
    failed: list[str] = []

    def tell(what: str, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}: {text}", flush=True)

    def attempt(what: str, work: Callable[[], str]) -> None:
        try:
            tell(what, work())
        except (MetarunError, OSError, ValueError) as error:
            failed.append(f"{what}: {error}")
            tell(what, f"FAILED: {error}")

    def measured(setting: str, method: str) -> str:
        many = steps_for(60 * options.minutes, 1e-3)  # it is stopped long before
        own = settings_of(setting, method, options, many)
        seconds = measure(
            own, out / setting / method / "probe", min(15.0, max(1.0, 3 * options.minutes))
        )
        plan.put(setting, method, seconds)
        steps = plan.steps(setting, method)
        return f"{seconds:.3g} s for a meta-step, so {steps:,} in {minutes_text(options)}"

    def trained(setting: str, method: str, seed: int) -> str:
        steps = plan.steps(setting, method) if kinds[method].learns else VALIDATIONS
        assert steps is not None
        own = [*settings_of(setting, method, options, steps), f"seed={seed}"]
        start = time.monotonic()
        ended = train(own, out / setting / method / f"s{seed}")
        return f"{ended}, {time.monotonic() - start:.0f} s"

    pairs = [(s, m) for s in settings for m in methods]
    all_at_once(
        [
            lambda s=s, m=m: attempt(f"{s}/{m}", lambda: measured(s, m))
            for s, m in pairs
            if kinds[m].learns and plan.steps(s, m) is None
        ],
        given.jobs,
    )
    ready = [(s, m) for s, m in pairs if not kinds[m].learns or plan.steps(s, m) is not None]
    all_at_once(
        [
            lambda s=s, m=m, n=n: attempt(f"{s}/{m}/s{n}", lambda: trained(s, m, n))
            for n in range(given.seeds)  # a first table of all is there after the first seed
            for s, m in ready
        ],
        given.jobs,
    )
    lacking_runs = {text.partition(":")[0] for text in failed}
    tables = {
        s: rows_of(
            (
                out / s / m / f"s{n}"
                for m in methods
                if (s, m) in ready
                for n in range(given.seeds)
                if f"{s}/{m}/s{n}" not in lacking_runs
            ),
            plan.step_seconds(s),
        )
        for s in settings
    }
    text = markdown(tables, options)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "zoo.md", text)
    write_json(out / "zoo.json", as_json(tables, options) | {"failed": failed})
    print(f"\n{text}\nwritten to {out / 'zoo.md'} and {out / 'zoo.json'}")
    if given.markdown_into:
        put_into(Path(given.markdown_into), text, given.block)
        print(f"and into {given.markdown_into}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


def chosen(wanted: Sequence[str], known: Iterable[str], option: str) -> list[str]:
    """The wanted names, each once.

    Raises:
        ConfigError: one is not known.
    """
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"{option}: {', '.join(unknown)} is none of {', '.join(known)}")
    return list(dict.fromkeys(wanted))


def all_at_once(work: Sequence[Callable[[], None]], jobs: int) -> None:
    """Do all of it, `jobs` at a time; Ctrl-C lets those that run save a checkpoint."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(each) for each in work]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                process.terminate()
            raise


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    sys.exit(main())
