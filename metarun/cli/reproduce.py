"""`metarun reproduce`: run experiments with a published figure, and say how near ours is."""

import fnmatch
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metarun.config.typed import as_argument, expanded
from metarun.errors import ConfigError, RunError, did_you_mean
from metarun.reproduction.rows import BUDGETS, FULL, Row, experiment, rows
from metarun.system.files import write_json, write_text
from metarun.system.untrusted import UntrustedError

if TYPE_CHECKING:
    from metarun.reproduction.measured import Measured

USAGE = "metarun reproduce ROW… [budget=cpu] [seed=0,1,2] [out=DIR] [page=FILE] [KEY=VALUE …]"
HELP = f"""\
metarun reproduce: run experiments with a published figure, and say how near ours is

usage: {USAGE}
       metarun reproduce --list [ROW…] [budget=cpu] [out=DIR] [page=FILE]
       metarun reproduce --table [out=DIR] [page=FILE]

  ROW         a row's name, or a pattern such as 'maml_omniglot_*'
  --list      the rows: what was published, and what of them has been run
  --table     write the tables again, and run nothing
  budget=cpu  the same protocol with fewer meta-steps: minutes to an hour on two cores
  seed=0,1,2  a run for each (default: 0)
  out=DIR     folder of the runs and tables (default: outputs/reproduce)
  page=FILE   write the Markdown page there as well, and its figures beside it, as .json; figures
              that stand there and were measured elsewhere are kept
  KEY=VALUE   for metarun train: hydra/launcher=submitit_slurm, device=cuda, data.root=FOLDER …

A row is an experiment: `metarun train experiment=ROW` trains it, `experiment=cpu/ROW` with the
budget of a CPU. All rows together are one sweep. The same command goes on where it was interrupted
and recalls what is done. Written are results.md and results.json, with every row: those that were
not run say so.

examples:
  metarun reproduce --list
  metarun reproduce maml_omniglot_5w1s budget=cpu
  metarun reproduce 'protonet_omniglot_*' seed=0,1,2 hydra/launcher=joblib
"""
FLAGS = ("--list", "--table", "-h", "--help")
OWN = ("budget", "seed", "out", "page")
SUBDIR = "hydra.sweep.subdir=${hydra:runtime.choices.experiment}/s${seed}"


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    rows: list[Row]
    flag: str | None
    budget: str
    budgets: tuple[str, ...]  # that are listed
    seeds: str
    out: Path
    page: Path | None
    more: list[str]


def main(arguments: Sequence[str]) -> None:
    """Run `metarun reproduce` with the arguments behind the command's name.

    Raises:
        ConfigError: the arguments are wrong, or the sweep says so of the settings.
        RunError: some runs failed, or the tables cannot be written.
    """
    if "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return
    wanted = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from metarun.config.compose import register_schemas

    register_schemas()
    if wanted.flag == "--list":
        _list(wanted)
        return
    _check_own(wanted)  # a page that cannot be written is told before hours of training
    _known(wanted)
    code = 0 if wanted.flag == "--table" else _train(wanted)
    if code == 130:
        raise KeyboardInterrupt
    _write(wanted)
    if code:
        kind = ConfigError if code == 2 else RunError
        raise kind(
            f"not all rows were run: the sweep ended with exit code {code}, see above; with "
            "another out=DIR every run begins in a new folder"
        )


def parse(arguments: Sequence[str]) -> Arguments:
    """Tell rows from settings.

    Raises:
        ConfigError: says what is wrong.
    """
    own: dict[str, str] = {}
    patterns, flags, more = [], [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in FLAGS:
            flags.append(argument)
        elif argument.startswith("-"):
            raise ConfigError(
                f"there is no option {argument!r}{did_you_mean(argument, FLAGS)}; usage: {USAGE}"
            )
        elif equals and key in OWN:
            if not value:
                raise ConfigError(f"{key}= is empty: give a value")
            own[key] = value
        elif equals:
            near = did_you_mean(key, OWN)
            if near and "." not in key and key not in _settings_of_training():
                raise ConfigError(f"there is no setting {key!r}{near}; usage: {USAGE}")
            more.append(argument)
        else:
            patterns.append(argument)
    for key in ("experiment", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir"):
        if given := [argument for argument in more if argument.startswith(f"{key}=")]:
            raise ConfigError(
                f"{given[0]}: rows are named without a key, and out=DIR is the folder"
            )
    budget = own.get("budget", FULL)
    if budget not in BUDGETS:
        raise ConfigError(f"budget={budget}: choose {' or '.join(BUDGETS)}")
    if len(flags) > 1:
        raise ConfigError(f"{' and '.join(flags)}: give one of them")
    flag = flags[0] if flags else None
    found = _chosen(patterns)
    if flag is None:
        if not patterns:
            raise ConfigError(
                "not given: which rows to run; `metarun reproduce --list` shows them; "
                f"usage: {USAGE}"
            )
        if lacking := [row.name for row in found if budget not in row.budgets]:
            raise ConfigError(f"budget={budget}: {', '.join(lacking)} has no such budget")
    else:
        idle = [f"seed={own['seed']}"] if "seed" in own else []
        if flag == "--table":  # it prints and writes what there is
            idle += [f"budget={budget}"] if "budget" in own else []
            idle += patterns
        if more or idle:
            raise ConfigError(f"{[*more, *idle][0]}: {flag} trains nothing; leave it out")
        if "budget" in own:
            found = [row for row in found if budget in row.budgets]
    out = Path(expanded("out", own.get("out", "outputs/reproduce")))
    page = Path(expanded("page", own["page"])) if "page" in own else None
    if page is not None and page.suffix != ".md":
        raise ConfigError(f"page={page}: its name must end with .md")
    budgets = (budget,) if "budget" in own else BUDGETS
    return Arguments(found, flag, budget, budgets, own.get("seed", "0"), out, page, more)


def _settings_of_training() -> set[str]:
    from dataclasses import fields

    from metarun.config.run import TrainConfig

    return {f.name for f in fields(TrainConfig)}


def _chosen(patterns: Sequence[str]) -> list[Row]:
    """The rows of names and patterns, in the order of the list; all if there are none."""
    known, chosen = rows(), set()
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        if not names:
            raise ConfigError(
                f"there is no row {pattern!r}{did_you_mean(pattern, known)}; "
                "`metarun reproduce --list` shows them"
            )
        chosen |= set(names)
    return [row for name, row in known.items() if not patterns or name in chosen]


def _train(wanted: Arguments) -> int:
    """Run the rows as one sweep of `metarun train`; its exit code."""
    names = ",".join(experiment(row, wanted.budget) for row in wanted.rows)
    command = [
        *(sys.executable, "-m", "metarun", "train", "-m"),
        f"experiment={names}",
        f"seed={wanted.seeds}",
        as_argument("hydra.sweep.dir", wanted.out),
        SUBDIR,
        *wanted.more,
    ]
    # In a group of its own, so that the terminal's Ctrl-C does not reach it twice.
    process = subprocess.Popen(command, process_group=0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, _: process.send_signal(number)) for n in numbers]
    try:
        return process.wait()  # it saves a checkpoint first
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _list(wanted: Arguments) -> None:
    from metarun.reproduction.page import line, published_text
    from metarun.reproduction.results import result_of

    known = _known(wanted)
    for row in wanted.rows:
        done = [
            result
            for budget in row.budgets
            if budget in wanted.budgets
            and (result := result_of(wanted.out, row, budget, known)).state != "not run"
        ]
        budgets = ", ".join(budget for budget in row.budgets if budget in wanted.budgets)
        said = f"{row.name} ({budgets}): published {published_text(row)}; not run"
        print("\n".join(map(line, done)) or said)


def _known(wanted: Arguments) -> "dict[tuple[str, str], Measured]":
    """The figures beside the page, which may be of other machines."""
    from metarun.reproduction.measured import read_measured

    if wanted.page is None:
        return {}
    figures = wanted.page.with_suffix(".json")
    if wanted.page.exists() and not figures.exists():
        raise ConfigError(
            f"page={wanted.page}: its figures are not beside it, in {figures.name}: they would be "
            "lost. Copy both files, or choose another name"
        )
    try:
        return read_measured(figures)
    except UntrustedError as error:
        raise ConfigError(f"page={wanted.page}: {error}") from error


def _own_files(wanted: Arguments) -> list[Path]:
    return [wanted.out / "results.md", *([wanted.page] if wanted.page else [])]


def _check_own(wanted: Arguments) -> None:
    """Refuse to write over pages of others."""
    from metarun.reproduction.page import MARK

    for path in _own_files(wanted):
        if path.exists() and not (path.is_file() and MARK in path.read_text(errors="replace")):
            raise ConfigError(f"{path} was not written by metarun reproduce: choose another name")


def _write(wanted: Arguments) -> None:
    """Print the rows that were asked for; write the tables of all."""
    from metarun.reproduction.page import as_json, line, page
    from metarun.reproduction.results import result_of

    files = _own_files(wanted)
    results, known = [], _known(wanted)
    for row in rows().values():
        own = [result_of(wanted.out, row, budget, known) for budget in row.budgets]
        # One line of a row that was not run, however many budgets it has.
        results += [result for result in own if result.state != "not run"] or own[:1]
    asked = {(row.name, wanted.budget) for row in wanted.rows}
    for result in results:
        chosen = (result.row.name, result.budget) in asked
        if chosen if wanted.flag is None else result.measured is not None:
            print(line(result))
    text = page(results)
    try:
        for path in files:
            write_text(path, text)
            write_json(path.with_suffix(".json"), as_json(results))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
    print(f"\nwritten to {', '.join(str(path) for path in sorted(files))}")
