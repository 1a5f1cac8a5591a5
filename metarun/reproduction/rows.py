"""The rows of published figures: what was published, and the protocol that gave it.

The files `rows/<data>.toml` are their only source; `conf/experiment` is written from them
(`scripts/write_conf.py`). A file has

- `title` and `score` ("accuracy" or "mse") of the data set,
- `contents`: what the data are told by, as `metarun report` shows it; any if it is not given,
- `shapes`: the settings of `task` for each task shape, by its name, such as 5w1s,
- `settings` and `cpu`: settings of `metarun train` in all rows, and those laid over them for the
  budget of two CPU cores,
- a table for each method.

A method has a row for each shape: `<method>_<data>_<shape>`. Its table has

- `title`, and `groups` (which component of each group),
- `settings` and `cpu`, as above,
- `differences`: in words, what its rows do otherwise than their source,
- `source`, `read` and `over`, of its figures: where they are printed, where they were read to be
  written down here, and what their intervals are of,
- a table for each shape that has something of its own: a figure (`accuracy` in per cent, or `mse`)
  and its `interval`; and any of those above but `title` and `groups`,
- `like`: another method, or `<data>/<method>`, that all else but figures is taken from. Differences
  add up.

Settings of a shape win over those of its method, and these over those of the file. A row has the
budget `cpu` if its `cpu` says how many meta-steps that is.

No figure stands here from memory.
"""

import tomllib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

BUDGETS = FULL, CPU = "full", "cpu"
"""The protocol of the source, and the same with fewer meta-steps."""

SCORES = ("accuracy", "mse")
FILE_KEYS = ("title", "score", "contents", "shapes", "settings", "cpu")
OF_FIGURES = ("source", "read", "over")
METHOD_KEYS = ("title", "groups", "settings", "cpu", "differences", "like", *OF_FIGURES)
SHAPE_KEYS = (*SCORES, "interval", "settings", "cpu", "differences", *OF_FIGURES)
SURE = "95 %"
"""Begins `over` where an interval is known to be one of 95 %."""

Table = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        score: what it is.
        value: it; of an accuracy, the fraction.
        ci95: half of its 95 % interval, in the same unit; None where none was published, or one
            of another or an unknown kind, which `over` then names.
        over: what the interval is of, such as "95 %, 600 tasks"; empty without one.
        source: the paper, and who quotes it.
    """

    score: Literal["accuracy", "mse"]
    value: float
    ci95: float | None
    over: str
    source: str


@dataclass(frozen=True)
class Row:
    """A row: a method on a data set, in one shape of task.

    Attributes:
        name: such as "maml_omniglot_5w1s".
        title: of the method.
        data: name of the data set.
        data_title: the same in words.
        setting: the task shape, such as "5w1s" or "k10".
        score: what its figures are.
        published: the figure; None where none could be verified.
        differences: what the row does otherwise than the source, in words.
        budgets: of `FULL` and `CPU`, those that it has.
        groups: group -> component.
        settings: budget -> nested settings of `metarun train`.
        contents: what runs may have seen (`Figures.content`); anything if there are none.
    """

    name: str
    title: str
    data: str
    data_title: str
    setting: str
    score: Literal["accuracy", "mse"]
    published: Published | None
    differences: tuple[str, ...]
    budgets: tuple[str, ...]
    groups: dict[str, str]
    settings: dict[str, Table]
    contents: tuple[str, ...] = ()


@cache
def rows() -> dict[str, Row]:
    """All rows by name, in the order of the files.

    Raises:
        ValueError: a file has an unknown key, or lacks one.
    """
    return rows_of(read())


def experiment(row: Row, budget: str) -> str:
    """The experiment of a row, as in `metarun train experiment=…`.

    Raises:
        ValueError: the row has no such budget.
    """
    if budget not in row.budgets:
        raise ValueError(f"{row.name} has no budget {budget!r}, only {', '.join(row.budgets)}")
    return row.name if budget == FULL else f"{budget}/{row.name}"


def read() -> dict[str, Table]:
    """The content of each file, by the name of its data set."""
    found = files("metarun.reproduction").joinpath("rows").iterdir()
    paths = sorted((path for path in found if path.name.endswith(".toml")), key=lambda p: p.name)
    return {
        path.name.removesuffix(".toml"): tomllib.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }


def rows_of(tables: dict[str, Table]) -> dict[str, Row]:
    """The rows of such contents.

    Raises:
        ValueError: as `rows`.
    """
    made = [
        row
        for data, table in tables.items()
        for method in methods(data, table)
        for row in _of_method(tables, data, method)
    ]
    return {row.name: row for row in made}


def methods(data: str, table: Table) -> list[str]:
    """Names of the methods of a file, whose keys are checked.

    Raises:
        ValueError: one is unknown or missing.
    """
    found = [key for key in table if key not in FILE_KEYS]
    _check(data, table, (*FILE_KEYS, *found), ("title", "score", "shapes"))
    if table["score"] not in SCORES:
        raise ValueError(f"{data}.toml: score is {table['score']!r}, not one of {SCORES}")
    for method in found:
        own = table[method]
        if not isinstance(own, dict):
            raise ValueError(f"{data}.toml: unknown key {method!r}")
        required = ("title",) if "like" in own else ("title", "groups")
        _check(f"{data}.toml, {method}", own, (*METHOD_KEYS, *table["shapes"]), required)
        for shape in table["shapes"]:
            where = f"{data}.toml, {method}.{shape}"
            given = own.get(shape, {})
            _check(where, given, SHAPE_KEYS, ())
            _check_figure(where, given, own, table["score"])
    return found


def _check(where: str, table: Table, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    if unknown := [key for key in table if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if missing := [key for key in required if key not in table]:
        raise ValueError(f"{where}: {missing[0]} is missing")


def _check_figure(where: str, own: Table, method: Table, score: str) -> None:
    other = next(name for name in SCORES if name != score)
    if other in own:
        raise ValueError(f"{where}: its figure must be {score}, not {other}")
    for key in ("source", "read"):
        if score in own and not (own.get(key) or method.get(key)):
            raise ValueError(f"{where}: a figure needs its {key}")
    if "interval" in own and not (own.get("over") or method.get("over")):
        raise ValueError(f"{where}: an interval needs its kind, in over")
    if "interval" in own and score not in own:
        raise ValueError(f"{where}: an interval without a figure")


def _of_method(tables: dict[str, Table], data: str, method: str) -> Iterator[Row]:
    table = tables[data]
    own = _with_likeness(tables, data, method)
    for shape, task in table["shapes"].items():
        given = own.get(shape, {})
        full = laid_over(
            {"task": task}, table.get("settings"), own.get("settings"), given.get("settings")
        )
        cpu = laid_over(table.get("cpu"), own.get("cpu"), given.get("cpu"))
        budgets = BUDGETS if "steps" in cpu.get("trainer", {}) else (FULL,)
        yield Row(
            name=f"{method}_{data}_{shape}",
            title=own["title"],
            data=data,
            data_title=table["title"],
            setting=shape,
            score=table["score"],
            published=_figure(table["score"], table[method], shape),
            differences=(*own.get("differences", ()), *given.get("differences", ())),
            budgets=budgets,
            groups={**own["groups"], "data": data},
            settings={b: laid_over(full, cpu if b == CPU else None) for b in budgets},
            contents=tuple(table.get("contents", ())),
        )


def _with_likeness(tables: dict[str, Table], data: str, method: str) -> Table:
    """A method's table over that of the method that it is like, whose figures do not matter."""
    own: Table = tables[data][method]
    if "like" not in own:
        return own
    other_data, _, other = own["like"].rpartition("/")
    other_data = other_data or data
    if other not in tables.get(other_data, {}) or (other_data, other) == (data, method):
        raise ValueError(f"{data}.toml, {method}: like = {own['like']!r} is no other method")
    base = _with_likeness(tables, other_data, other)
    differences = [*base.get("differences", ()), *own.get("differences", ())]
    return {**laid_over(base, own), "differences": differences}


def _figure(score: Literal["accuracy", "mse"], method: Table, shape: str) -> Published | None:
    own = method.get(shape, {})
    if score not in own:
        return None
    unit = 100 if score == "accuracy" else 1
    over, interval = "", own.get("interval")
    if interval is not None:
        over = own.get("over") or method["over"]
    sure = over.startswith(SURE)
    return Published(
        score=score,
        value=own[score] / unit,
        ci95=interval / unit if interval is not None and sure else None,
        over=over if sure or interval is None else f"± {interval} {over}",
        source=own.get("source") or method["source"],
    )


def laid_over(*tables: Table | None) -> Table:
    """Nested tables, of which later ones win; none of them is changed."""
    merged: Table = {}
    for table in tables:
        for key, value in (table or {}).items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = laid_over(merged[key], value) if both else deepcopy(value)
    return merged
