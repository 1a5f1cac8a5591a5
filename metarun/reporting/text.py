"""A report as text: for a terminal, and as Markdown."""

from metarun.reporting.calibrations import NOTE as OF_CALIBRATION
from metarun.reporting.comparison_table import NOTE
from metarun.reporting.confusions import NOTE as OF_CONFUSION
from metarun.reporting.content import ORDER, Report
from metarun.reporting.table import as_lines, as_markdown, markdown_text

MARK = "<!-- metarun report -->"


def terminal(report: Report) -> str:
    """What the command prints."""
    lines = [report.counts]
    for section in report.sections:
        lines += ["", section.board.title, *as_lines(*section.table)]
        if section.pairs[1]:
            lines += ["", "differences, task by task", *as_lines(*section.pairs)]
    if report.calibrated[1]:
        lines += ["", "calibrated evaluations", *as_lines(*report.calibrated)]
    if report.confused[1]:
        lines += ["", "classes that are confused", *as_lines(*report.confused)]
    if report.unfinished[1]:
        lines += ["", "not finished", *as_lines(*report.unfinished)]
    for heading, entries in report.lists:
        lines += ["", heading.lower(), *(f"  {entry}" for entry in entries)]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The content of report.md."""
    lines = [MARK, f"# {markdown_text(report.title)}", "", markdown_text(report.counts)]
    for section in report.sections:
        lines += ["", f"## {markdown_text(section.board.title)}", "", ORDER, ""]
        lines += as_markdown(*section.table)
        if section.pairs[1]:
            lines += ["", "### Differences", "", NOTE, "", *as_markdown(*section.pairs)]
    if report.calibrated[1]:
        lines += ["", "## Calibrated evaluations", "", OF_CALIBRATION, ""]
        lines += as_markdown(*report.calibrated)
    if report.confused[1]:
        lines += ["", "## Classes that are confused", "", OF_CONFUSION, ""]
        lines += as_markdown(*report.confused)
    if report.unfinished[1]:
        lines += ["", "## Not finished", "", *as_markdown(*report.unfinished)]
    for heading, entries in report.lists:
        lines += ["", f"## {heading}", "", *(f"- {markdown_text(entry)}" for entry in entries)]
    return "\n".join(lines) + "\n"
