"""`metarun report`. Imports no torch, so it answers at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metarun.config.typed import expanded
from metarun.errors import ConfigError, RunError, did_you_mean
from metarun.system.files import write_text

USAGE = "metarun report DIR… [out=DIR]"
HELP = f"""\
metarun report: compare runs: tables and plots

usage: {USAGE}

  DIR…     run directories, sweep directories or folders of them
  out=DIR  where the report goes (default: the first DIR)

Runs that differ in nothing but the seed are one line: mean and 95 % confidence interval over
seeds; of a single seed, the interval over its test tasks. Written are report.md, report.html
(one page with plots, which needs no network), report.csv (a line for each group),
report_runs.csv (a line for each run) and report_pairs.csv (a line for each pair of groups, with
their difference on the tasks that both have met). Runs without a result are listed with the reason.

examples:
  metarun report outputs/train/my_sweep
  metarun report outputs/train out=outputs/report
"""

MARKS = {
    "report.html": b"metarun report",
    "report.md": b"metarun report",
    "report.csv": b"score,value,ci95,ci95_over,seeds,",
    "report_runs.csv": b"directory,status,meta_steps,",
    "report_pairs.csv": b"tasks,first,second,score,difference,",
}
"""What is near the beginning of each file that is ours."""


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    roots: list[Path]
    out: Path


def main(arguments: Sequence[str]) -> None:
    """Run `metarun report` with the arguments behind the command's name.

    Raises:
        ConfigError: the arguments are wrong, or there are no runs.
        RunError: the report cannot be written.
    """
    if "-h" in arguments or "--help" in arguments:
        print(HELP, end="")
        return
    wanted = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write_report(wanted.roots, wanted.out)


def parse(arguments: Sequence[str]) -> Arguments:
    """Tell directories from settings.

    Raises:
        ConfigError: says what is wrong.
    """
    roots, out = [], None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if Path(argument).exists():
            roots.append(Path(argument))
        elif argument.startswith("-"):
            raise ConfigError(f"there is no option {argument!r}; usage: {USAGE}")
        elif equals and key == "out":
            if not value:
                raise ConfigError("out= is empty: name a folder, e.g. out=outputs/report")
            out = Path(expanded("out", value))
        elif equals and "/" not in key:
            raise ConfigError(
                f"there is no setting {key!r}{did_you_mean(key, ['out'])}, nor a folder "
                f"{argument!r}; usage: {USAGE}"
            )
        else:
            roots.append(Path(expanded("DIR", argument)))
    if not roots:
        raise ConfigError(f"not given: the runs to report; usage: {USAGE}")
    return Arguments(roots, out or roots[0])


def write_report(roots: Sequence[str | Path], out: str | Path) -> None:
    """Gather runs, print the comparison and write it to `out`.

    Raises:
        ConfigError: a directory is not there, none holds a run, or `out` has files of these
            names that are no reports.
        RunError: the report cannot be written.
    """
    from metarun.reporting.content import report_on  # imports Matplotlib
    from metarun.reporting.page import render
    from metarun.reporting.text import markdown, terminal

    roots, out = [Path(root) for root in roots], Path(out)
    if out not in roots or out.is_dir():  # else the runs are wrong, as `gather` will say
        _refuse_foreign(out)
    report, tables = report_on(roots)
    contents = {"report.html": render(report), "report.md": markdown(report), **tables}
    print(terminal(report))
    try:
        for name, content in contents.items():
            write_text(out / name, content)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}; choose out=…") from error
    print(f"\nwritten to {', '.join(str(out / name) for name in contents)}")


def _refuse_foreign(out: Path) -> None:
    """Never overwrite a report.md or a table that somebody has written by hand."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is no folder")
    for name, mark in MARKS.items():
        path = out / name
        if path.exists() and not (path.is_file() and mark in _beginning(path)):
            raise ConfigError(f"{path} is no report of metarun: choose another out=")


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2**16)
