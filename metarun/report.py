"""`metarun report`. Imports no torch, so it answers at once."""

import difflib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metarun.errors import ConfigError, RunError
from metarun.files import write_text

log = logging.getLogger(__name__)

USAGE = "metarun report DIR… [out=DIR]"
HELP = f"""\
metarun report: compare runs: tables and plots

usage: {USAGE}

  DIR…     run directories, sweep directories or folders of them
  out=DIR  where the report goes (default: the first DIR)

Runs that differ in nothing but the seed are one line: mean and 95 % confidence interval over
seeds; of a single seed, the interval over its test tasks. Written are report.md, report.html
(one page with plots, which needs no network), report.csv (a line for each group) and
report_runs.csv (a line for each run). Runs without a result are listed with the reason.

examples:
  metarun report outputs/train/my_sweep
  metarun report outputs/train out=outputs/report
"""

NAMES = ("report.html", "report.md", "report.csv", "report_runs.csv")
MARK = "metarun report"  # in the first two kilobytes of a page of ours
PLOTTED = 4  # boards with plots


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
            out = Path(value).expanduser()
        elif equals and "/" not in key:
            close = difflib.get_close_matches(key, ["out"], n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"there is no setting {key!r}{hint}; usage: {USAGE}")
        else:
            roots.append(Path(argument).expanduser())
    if not roots:
        raise ConfigError(f"not given: the runs to report; usage: {USAGE}")
    return Arguments(roots, out or roots[0])


def write_report(roots: Sequence[Path], out: Path) -> None:
    """Gather runs, print the comparison and write it to `out`.

    Raises:
        ConfigError: a directory is not there, none holds a run, or `out` has files of these
            names that are no reports.
        RunError: the report cannot be written.
    """
    from metarun.reporting.gather import gather
    from metarun.reporting.groups import boards
    from metarun.reporting.page import Section, render
    from metarun.reporting.plots import plots
    from metarun.reporting.table import (
        as_lines,
        as_markdown,
        groups_csv,
        markdown_text,
        runs_csv,
        unfinished_table,
    )

    _refuse_foreign(out)
    found = gather(roots)
    if not found.runs and not found.refused:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in found.skipped[:10])
        where = ", ".join(map(str, roots))
        raise ConfigError(f"there are no runs of metarun in {where}{reasons}")
    compared, notes = boards(found.runs)
    statuses = Counter(run.status for run in found.runs)
    statuses["failed"] += len(found.refused)
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items() if count)
    total = sum(statuses.values())
    counts = f"{total} run{'s' * (total != 1)}: {counts}"
    sections = [
        Section(board, plots(board) if index < PLOTTED else [])
        for index, board in enumerate(compared)
    ]
    if len(compared) > PLOTTED:
        notes.append(
            f"plots are drawn for the first {PLOTTED} of {len(compared)} comparisons: give "
            "fewer directories for the others"
        )
    unfinished = unfinished_table(found)
    title = f"Report on {', '.join(map(str, roots))}"

    shown = [counts]
    text = [f"<!-- {MARK} -->", f"# {markdown_text(title)}", "", markdown_text(counts)]
    for section in sections:
        header, rows = section.table
        shown += ["", section.board.title, *as_lines(header, rows)]
        text += ["", f"## {markdown_text(section.board.title)}", "", *as_markdown(header, rows)]
    if unfinished[1]:
        shown += ["", "not finished", *as_lines(*unfinished)]
        text += ["", "## Not finished", "", *as_markdown(*unfinished)]
    left_out = [f"{path}: {reason}" for path, reason in found.skipped]
    for heading, entries in (("Left out", left_out), ("To know", notes)):
        if entries:
            shown += ["", heading.lower(), *(f"  {entry}" for entry in entries)]
            text += ["", f"## {heading}", "", *(f"- {markdown_text(entry)}" for entry in entries)]
    contents = {
        "report.html": render(title, counts, sections, unfinished, found, notes),
        "report.md": "\n".join(text) + "\n",
        "report.csv": groups_csv(compared),
        "report_runs.csv": runs_csv(found),
    }
    print("\n".join(shown))
    try:
        for name, content in contents.items():
            write_text(out / name, content)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}; choose out=…") from error
    print(f"\nwritten to {', '.join(str(out / name) for name in contents)}")


def _refuse_foreign(out: Path) -> None:
    """Never overwrite a report.md that somebody has written by hand."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is no folder")
    pages = [out / name for name in ("report.html", "report.md")]
    for path in pages:
        if path.exists() and MARK.encode() not in path.read_bytes()[:2048]:
            raise ConfigError(f"{path} is no report of metarun: choose another out=")
