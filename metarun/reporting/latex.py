"""The tables of a report for a paper."""

from collections.abc import Sequence

from metarun.reporting.content import Report
from metarun.reporting.table import Cell, numeric_columns

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "…": r"\dots{}",
    "’": "'",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "[": "{[}",  # after a line's end, LaTeX takes it for the size of a gap
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex(report: Report) -> str:
    """Each comparison as a `table` with a caption; it needs the package booktabs."""
    parts = ["% metarun report", r"% \usepackage{booktabs}"]
    for section in report.sections:
        parts += ["", *_table(section.board.title, *section.table)]
        if section.pairs[1]:
            parts += ["", *_table(f"{section.board.title}: differences", *section.pairs)]
    return "\n".join(parts) + "\n"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    columns = "".join("r" if right else "l" for right in numeric_columns(header, rows))
    return [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escaped(caption)}}}",
        f"  \\begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {' & '.join(map(escaped, header))} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(escaped(cell.text) for cell in row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def escaped(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_SPECIAL.get(c, c) for c in text)
