"""The shape of tasks in words, as results and reports have it."""

from collections.abc import Mapping
from typing import Any

from metarun.config.run import EVEN, TaskConfig


def shape_of(task: TaskConfig) -> dict[str, Any]:
    """The shape of a task, as results have it; of uneven tasks with what it is drawn by."""
    shape = {"way": task.way, "shot": task.shot, "query": task.query}
    if task.uneven is None:
        return shape
    drawn = {key: getattr(task, key) for key in EVEN}
    return shape | {key: value for key, value in drawn.items() if value != EVEN[key]}


def classes(shape: Mapping[str, Any]) -> str:
    """How many classes there are.

    >>> from metarun.config.shape import classes
    >>> classes({"way": 5}), classes({"way": 20, "min_way": 5})
    ('5', '5 to 20')
    """
    return f"{_from(shape, 'min_way', 'way')}{shape['way']}"


def ways(shape: Mapping[str, Any]) -> str:
    """The same as the field says it: '5-way', '5 to 20-way'."""
    return f"{classes(shape)}-way"


def shots(shape: Mapping[str, Any]) -> str:
    """The number of support examples.

    >>> from metarun.config.shape import shots
    >>> shots({"shot": 1}), shots({"shot": 5, "min_shot": 1})
    ('1-shot', '1 to 5-shot')
    >>> shots({"way": 50, "shot": 100, "imbalanced": True, "max_support": 500})
    'imbalanced (500 support examples at most)'
    """
    if shape.get("imbalanced"):
        most = shape.get("max_support")
        return "imbalanced" + (f" ({most} support examples at most)" if most else "")
    return f"{_from(shape, 'min_shot', 'shot')}{shape['shot']}-shot"


def _from(shape: Mapping[str, Any], least: str, most: str) -> str:
    value = shape.get(least)
    return "" if value in (None, shape[most]) else f"{value} to "
