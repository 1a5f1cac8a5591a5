"""`metarun report`. Imports no torch, so it answers at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metarun.config.typed import expanded
from metarun.errors import ConfigError, RunError, did_you_mean
from metarun.system.files import write_text

USAGE = "metarun report DIR… [out=DIR] [bundle=FILE.zip] | metarun report FILE.zip"
HELP = f"""\
metarun report: compare runs: tables and plots

usage: {USAGE}

  DIR…     run directories, sweep directories or folders of them
  out=DIR  where the report goes (default: the first DIR)
  bundle=FILE.zip
           also write the configs, versions, logs and scores by task of all runs, and the tables,
           into one file for others; without weights, host names and command lines
  FILE.zip check such a file: every figure and table is computed again from the scores by task

Runs that differ in nothing but the seed are one line: mean and 95 % confidence interval over
seeds; of a single seed, the interval over its test tasks. Written are report.md, report.tex (for
papers, with booktabs), report.html (one page with plots, which needs no network), report.csv (a
line for each group), report_runs.csv (a line for each run) and report_pairs.csv (a line for each
pair of groups, with their difference on the tasks that both have met). Runs without a result are
listed with the reason.

examples:
  metarun report outputs/train/my_sweep
  metarun report outputs/train out=outputs/report
  metarun report outputs/train/my_sweep bundle=my_paper.zip
  metarun report my_paper.zip
"""

EXAMPLES = {"out": "outputs/report", "bundle": "my_paper.zip"}

MARKS = {
    "report.html": b"metarun report",
    "report.md": b"metarun report",
    "report.tex": b"metarun report",
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
    bundle: Path | None = None


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
    if _is_bundle(wanted.roots):
        check_bundle(wanted.roots[0])
    else:
        write_report(wanted.roots, wanted.out, wanted.bundle)


def parse(arguments: Sequence[str]) -> Arguments:
    """Tell directories from settings.

    Raises:
        ConfigError: says what is wrong.
    """
    roots: list[Path] = []
    files: dict[str, Path] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if Path(argument).exists():
            roots.append(Path(argument))
        elif argument.startswith("-"):
            raise ConfigError(f"there is no option {argument!r}; usage: {USAGE}")
        elif equals and key in EXAMPLES:
            if not value:
                raise ConfigError(f"{key}= is empty: give a name, e.g. {key}={EXAMPLES[key]}")
            files[key] = Path(expanded(key, value))
        elif equals and "/" not in key:
            raise ConfigError(
                f"there is no setting {key!r}{did_you_mean(key, EXAMPLES)}, nor a folder "
                f"{argument!r}; usage: {USAGE}"
            )
        else:
            roots.append(Path(expanded("DIR", argument)))
    if not roots:
        raise ConfigError(f"not given: the runs to report; usage: {USAGE}")
    if _is_bundle(roots) and files:
        raise ConfigError(
            f"{roots[0]} is checked, and nothing is written: leave out {next(iter(files))}="
        )
    bundle = files.get("bundle")
    if bundle is not None and bundle.suffix != ".zip":
        raise ConfigError(f"bundle={bundle}: its name must end with .zip")
    return Arguments(roots, files.get("out", roots[0]), bundle)


def _is_bundle(roots: Sequence[Path]) -> bool:
    return len(roots) == 1 and roots[0].suffix == ".zip" and roots[0].is_file()


def check_bundle(path: Path) -> None:
    """Print the report of a bundle, and check its figures against its scores by task.

    Raises:
        ConfigError: it is no bundle, is damaged, or was changed.
        RunError: a figure does not follow from its scores.
    """
    from metarun.reporting.bundle import TABLES, check, opened
    from metarun.reporting.content import report_on
    from metarun.reporting.latex import latex
    from metarun.reporting.text import terminal

    with opened(path) as folder:
        report, tables = report_on([folder / "runs"])
        print(terminal(report))
        runs, scores = check(folder, tables | {"report.tex": latex(report)})
    print(f"\nchecked {path}: the figures of {runs} runs follow from {scores} scores by task,")
    print(f"and {', '.join(TABLES)} from them; report.html and report.md were not compared")


def write_report(
    roots: Sequence[str | Path], out: str | Path, bundle: str | Path | None = None
) -> None:
    """Gather runs, print the comparison and write it to `out`.

    Args:
        bundle: a file for others, with all that the figures are made of; None: not written.

    Raises:
        ConfigError: a directory is not there, none holds a run, or `out` has files of these
            names that are no reports.
        RunError: the report cannot be written.
    """
    from metarun.reporting.bundle import write_bundle
    from metarun.reporting.content import report_on  # imports Matplotlib
    from metarun.reporting.latex import latex
    from metarun.reporting.page import render
    from metarun.reporting.text import markdown, terminal

    roots, out = [Path(root) for root in roots], Path(out)
    if out not in roots or out.is_dir():  # else the runs are wrong, as `gather` will say
        _refuse_foreign(out)
    report, tables = report_on(roots)
    contents = {"report.html": render(report), "report.md": markdown(report)}
    contents |= {"report.tex": latex(report), **tables}
    print(terminal(report))
    try:
        for name, content in contents.items():
            write_text(out / name, content)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}; choose out=…") from error
    print(f"\nwritten to {', '.join(str(out / name) for name in contents)}")
    if bundle is not None:
        count = write_bundle(Path(bundle), roots, contents)
        print(f"bundle of {count} runs: {bundle}; `metarun report {bundle}` checks it")


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
