"""The pictures of a report, as SVG."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from metarun.reporting.groups import Board, Group, confidence95, mean
from metarun.reporting.labels import unique
from metarun.reporting.table import duration

# Okabe and Ito's colours, which the colour-blind can tell apart, without the pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*"
TOP = 7  # groups in colour
GREY = "#BBBBBB"
POINTS = 300  # of a line
DRAWABLE = 1e100  # larger values are left out of lines: Matplotlib overflows
SETTINGS: Any = {
    "font.size": 10,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a setting is a dollar sign
    "svg.hashsalt": "metarun",  # the same report has the same bytes
}


@dataclass(frozen=True)
class Plot:
    """A picture with the words below it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Line:
    """One group's line: x, y, and the half-width of y's confidence interval over seeds."""

    group: Group
    x: list[float]
    y: list[float]
    ci95: list[float] | None


def plots(board: Board) -> list[Plot]:
    """Learning curves, inner-loop convergence and cost of a board's groups."""
    colours = _styles(board)
    with matplotlib.rc_context(SETTINGS):
        made = [
            _learning(board, colours, by_time=False),
            _learning(board, colours, by_time=True),
            _inner(board, colours, "score"),
            _inner(board, colours, "loss") if board.score != "mse" else None,  # the same
            _cost(board, colours),
        ]
    return [plot for plot in made if plot is not None]


Style = tuple[str, str, str]
"""Colour, line, marker."""


def highlighted(board: Board) -> list[Group]:
    """The groups in colour: the best by validation."""
    return board.groups[:TOP]


def best_by_optimizer(board: Board) -> list[Group]:
    """The best group by validation of each inner optimizer; methods without one have no group."""
    best: dict[str, Group] = {}
    for group in board.groups:
        if "inner_opt.name" in group.settings:
            best.setdefault(str(group.settings["inner_opt.name"]), group)
    return list(best.values())


def _styles(board: Board) -> dict[str, Style]:
    chosen = dict.fromkeys(
        group.label for group in [*highlighted(board), *best_by_optimizer(board)]
    )
    return {
        label: (
            COLOURS[i % len(COLOURS)],
            LINES[i // len(COLOURS) % len(LINES)],
            MARKERS[i % len(MARKERS)],
        )
        for i, label in enumerate(chosen)
    }


def _learning(board: Board, styles: dict[str, Style], by_time: bool) -> Plot | None:
    lines = []
    for group in board.groups:
        values = group.curve(f"val/{board.score}")
        times = group.validation_times()
        steps = [step for step in values if not by_time or step in times]
        steps = steps[:: max(1, len(steps) // POINTS)]
        if steps:
            x = [times[step] if by_time else float(step) for step in steps]
            lines.append(_over_seeds(group, x, [values[step] for step in steps]))
    if not lines:
        return None
    unit, scale = ("s", 1.0)
    if by_time and (longest := max(line.x[-1] for line in lines)) > 100:
        unit, scale = ("min", 60.0) if longest < 6000 else ("h", 3600.0)
    lines = [Line(line.group, [x / scale for x in line.x], line.y, line.ci95) for line in lines]
    return _line_plot(
        board,
        f"Validation {board.score} {'by time' if by_time else 'by meta-step'}",
        f"training with validations, {unit}" if by_time else "meta-step",
        lines,
        {label: style for label, style in styles.items() if label in _labels(highlighted(board))},
        _explain_colours(board),
        f"validation {board.score}",
        score_axis=True,
    )


def _inner(board: Board, styles: dict[str, Style], what: str) -> Plot | None:
    optimizers = best_by_optimizer(board)
    several = len(optimizers) > 1
    groups = optimizers if several else board.groups
    lines = []
    for group in groups:
        curves = [f.scores if what == "score" else f.losses for f in group.figures]
        columns = [list(column) for column in zip(*curves, strict=False)]
        if len(columns) > 1:
            lines.append(_over_seeds(group, [float(i) for i in range(len(columns))], columns))
    if not lines:
        return None
    name = board.score if what == "score" else "loss"
    note = ""
    if len(optimizers) < len(board.groups):
        note = (
            "One line an inner optimizer, each with its best settings by validation."
            if several
            else _explain_colours(board)
        )
    chosen = _labels(groups if several else highlighted(board))
    return _line_plot(
        board,
        f"Inner loop: test {name} by inner step",
        "inner step",
        lines,
        {label: style for label, style in styles.items() if label in chosen},
        note,
        f"test {name}, mean over tasks",
        score_axis=what == "score",
    )


def _cost(board: Board, styles: dict[str, Style]) -> Plot:
    groups = highlighted(board)[::-1]  # bars are drawn from below
    # Long names would leave no room for the bars.
    names = {label: textwrap.fill(name, 30) for label, name in _names(board).items()}
    lines = sum(names[group.label].count("\n") + 1 for group in groups)
    rows: list[tuple[str, list[float], Callable[[float], str]]] = [
        ("training with validations, s", [g.seconds for g in groups], duration),
        ("meta-steps/s", [g.steps_per_second or 0.0 for g in groups], lambda v: f"{v:.3g}"),
        ("peak memory, GiB", [g.memory_gib for g in groups], lambda v: f"{v:.2f}"),
    ]
    figure = Figure(
        figsize=(5.0, 3 * (0.5 + 0.06 * len(groups) + 0.18 * lines)), layout="constrained"
    )
    for axes, (title, values, text) in zip(figure.subplots(3, 1), rows, strict=True):
        bars = axes.barh(
            range(len(groups)), values, 0.7, color=[styles[group.label][0] for group in groups]
        )
        axes.bar_label(bars, [text(value) for value in values], padding=3, fontsize=8)
        axes.set_yticks(range(len(groups)), [names[group.label] for group in groups])
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlim(0, 1.15 * max([*values, 1e-9]))
        axes.grid(visible=False, axis="y")
    return Plot(
        "Cost", f"Means over seeds; the highest memory. {_explain_colours(board)}", as_svg(figure)
    )


def _line_plot(
    board: Board,
    title: str,
    x_label: str,
    lines: Sequence[Line],
    styles: dict[str, Style],
    note: str,
    y_label: str,
    score_axis: bool,
) -> Plot:
    figure = Figure(figsize=(5.0, 3.1 + 0.17 * len(styles)), layout="constrained")
    axes = figure.subplots()
    names = _names(board)
    for line in reversed(lines):  # the best on top
        _draw(axes, line, names[line.group.label], styles.get(line.group.label))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if all(float(x).is_integer() for line in lines for x in line.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half a step
    is_accuracy = score_axis and board.score == "accuracy"
    if is_accuracy:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif _spans_decades(lines):
        axes.set_yscale("log")
    _limit(axes, lines, is_accuracy)
    order = {names[label]: i for i, label in enumerate(styles)}
    handles, labels = axes.get_legend_handles_labels()
    entries = sorted(zip(handles, labels, strict=True), key=lambda e: order.get(e[1], math.inf))
    if len(lines) > 1:
        columns = 2 if max(len(label) for label in labels) < 24 else 1
        figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=columns)
    band = any(line.ci95 is not None for line in lines if line.group.label in styles)
    shaded = "Bands: 95 % confidence interval over seeds." if band else ""
    return Plot(title, " ".join(part for part in (note, shaded) if part), as_svg(figure))


def _draw(axes: Axes, line: Line, name: str, style: Style | None) -> None:
    if style is None:
        axes.plot(line.x, line.y, color=GREY, linewidth=0.8, zorder=1)
        return
    colour, dashes, marker = style
    axes.plot(
        line.x,
        line.y,
        color=colour,
        linestyle=dashes,
        marker=marker if len(line.x) <= 25 else None,
        label=name,
        zorder=3,
    )
    if line.ci95 is not None:
        low = [y - c for y, c in zip(line.y, line.ci95, strict=True)]
        high = [y + c for y, c in zip(line.y, line.ci95, strict=True)]
        axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _over_seeds(group: Group, x: list[float], columns: Sequence[Sequence[float]]) -> Line:
    means = [mean(values) for values in columns]
    spread = [confidence95(values) for values in columns] if len(group.runs) > 1 else None
    return Line(group, _drawable(x), _drawable(means), spread and _drawable(spread))


def _drawable(values: Sequence[float]) -> list[float]:
    return [value if abs(value) < DRAWABLE else math.nan for value in values]


def _limit(axes: Axes, lines: Sequence[Line], is_accuracy: bool) -> None:
    """Let the lines fill the picture: the band over two seeds may be many times their range."""
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    if not values or axes.get_yscale() == "log":
        return
    room = 0.25 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    low, high = min(values) - room, max(values) + room
    axes.set_ylim(max(low, 0.0), min(high, 1.0) if is_accuracy and max(values) <= 1.0 else high)


def _spans_decades(lines: Sequence[Line]) -> bool:
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _explain_colours(board: Board) -> str:
    if len(board.groups) <= TOP:
        return ""
    return f"In colour the {TOP} best of {len(board.groups)} by validation, the others grey."


def _labels(groups: Sequence[Group]) -> set[str]:
    return {group.label for group in groups}


def _names(board: Board) -> dict[str, str]:
    """What each label is in a picture: short, and unlike all others."""
    labels = [group.label for group in board.groups]
    short = [label if len(label) <= 60 else f"{label[:59]}…" for label in labels]
    return dict(zip(labels, unique(short), strict=True))


def as_svg(figure: Figure) -> str:
    """A figure as text; the same figure has the same bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
