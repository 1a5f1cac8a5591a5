"""What must be true of a checkpoint's fields, whoever wrote them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metarun.errors import CheckpointError

ELAPSED_FIELD = "elapsed_s"
"""The field of a checkpoint that no two runs share: it is no part of what they compute."""

MOST_SECONDS = 1e9


def check_fields(content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose fields are missing, of another type or out of range.

    What depends on the run (the names and shapes of its parameters, say) is checked where the
    run is known, with `same_structure`.

    Raises:
        CheckpointError: names the field.
    """
    step = content.get("step")
    best, scheduler, rng = content.get("best"), content.get("scheduler"), content.get("rng")
    optimizer, recent = content.get("outer_optimizer"), content.get("recent")
    right = {
        "version": is_count(content.get("version")),
        "config": isinstance(content.get("config"), dict) and _is_plain(content["config"]),
        "step": is_count(step),
        "meta": _is_parameters(content.get("meta")),
        "buffers": _is_parameters(content.get("buffers")),
        "frozen": _is_parameters(content.get("frozen")),
        "outer_optimizer": isinstance(optimizer, dict)
        and optimizer.keys() == {"state", "param_groups"}
        and isinstance(optimizer["state"], dict)
        and all(isinstance(state, dict) for state in optimizer["state"].values())
        and _is_list(optimizer["param_groups"], lambda group: isinstance(group, dict)),
        "scheduler": "scheduler" in content and (scheduler is None or isinstance(scheduler, dict)),
        "best": "best" in content and (best is None or _is_validation(best, step)),
        "last_eval": is_count(content.get("last_eval"), step),
        "planned_for": is_count(content.get("planned_for")) and content["planned_for"] > 0,
        "skipped": is_count(content.get("skipped"), step),
        "top": _is_list(content.get("top"), lambda item: _is_validation(item, step)),
        "recent": _is_metrics(recent),
        ELAPSED_FIELD: _is_time(content.get(ELAPSED_FIELD, 0.0)),
        "data_identity": isinstance(content.get("data_identity"), str | None),
        "examples": _is_examples(content.get("examples")),
        "chunks": _is_list(content.get("chunks", []), _are_chunks),
        "rng": isinstance(rng, dict)
        and is_random_state(rng.get("cpu"))
        and _is_list(rng.get("cuda"), is_random_state),
    }
    wrong = [name for name, fine in right.items() if not fine]
    if wrong:
        raise CheckpointError(f"its field '{wrong[0]}' is missing or not what it should be")


def is_count(value: Any, most: Any = 2**62) -> bool:
    """Whether a value is a whole number from 0 to `most`."""
    return type(value) is int and type(most) is int and 0 <= value <= most


def _is_time(value: Any) -> bool:
    return type(value) is float and 0 <= value < MOST_SECONDS


def _are_chunks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and is_count(chunk) and chunk > 0 for key, chunk in value.items()
    )


def is_random_state(value: Any) -> bool:
    """Whether a value has the form of torch's random states."""
    return isinstance(value, Tensor) and value.dtype is torch.uint8 and value.dim() == 1


def _is_plain(value: Any) -> bool:
    """Whether a value is a setting, or a tree of them: YAML could hold it."""
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _is_list(value: Any, fine: Any) -> bool:
    return isinstance(value, list) and all(fine(item) for item in value)


def _is_parameters(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(v, Tensor) for name, v in value.items()
    )


def _is_validation(value: Any, step: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"step", "score", "ci95"}
        and is_count(value["step"], step)
        and type(value["score"]) is float
        and math.isfinite(value["score"])
        and type(value["ci95"]) is float
    )


def _is_examples(value: Any) -> bool:
    """Nothing, as in an older checkpoint, or what `metarun.training.domain` says of examples."""
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"kind", "shape", "outputs", "classes"}
        and isinstance(value["kind"], str)
        and _is_list(value["shape"], lambda size: is_count(size, 10**6))
        and is_count(value["outputs"])
        and (value["classes"] is None or is_count(value["classes"]))
    )


def _is_metrics(value: Any) -> bool:
    """Nothing, or the metrics of some meta-steps, by name: each a first dimension of them."""
    if not isinstance(value, dict):
        return False
    own = value.get("own", {})
    if not value or value.keys() != METRICS or not isinstance(own, dict):
        return value == {}
    numbers = [value["loss"], value["score"], value["gradient_norm"], *own.values()]
    return (
        all(
            isinstance(v, Tensor) and v.is_floating_point() and v.dim() == dims and len(v) > 0
            for dims, values in ((1, numbers), (2, [value["inner_losses"]]))
            for v in values
        )
        and len({len(v) for v in [*numbers, value["inner_losses"]]}) == 1
    )


METRICS = {"loss", "score", "gradient_norm", "inner_losses", "own"}
STARTS = {"lr", "_last_lr"}  # of an optimizer and its schedule: from their start down to 0
COUNTS = {"step", "last_epoch", "_step_count"}  # likewise: from 0


def same_structure(expected: Any, found: Any, name: str) -> None:
    """Refuse an optimizer's or a schedule's state that cannot be a later one of the expected.

    Dictionaries must have the same keys, lists the same length, tensors the same shape and
    type. Plain values are settings, which must be the same, but for learning rates, which are
    between 0 and where they start, and counts, which are not negative.

    Args:
        expected: as it is at the start.
        name: what to call the value.

    Raises:
        CheckpointError: says where they differ.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            raise CheckpointError(f"{name} has not the entries that it should have")
        for key, value in expected.items():
            same_structure(value, found[key], f"{name}.{key}")
    elif isinstance(expected, list | tuple) and type(found) is type(expected):
        if len(expected) != len(found):
            raise CheckpointError(f"{name} has {len(found)} entries instead of {len(expected)}")
        for index, value in enumerate(expected):
            same_structure(value, found[index], f"{name}.{index}")
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        if (expected.shape, expected.dtype) != (found.shape, found.dtype):
            raise CheckpointError(
                f"{name} has shape {tuple(found.shape)} and type {found.dtype} instead of "
                f"{tuple(expected.shape)} and {expected.dtype}"
            )
        if _entries(name) & COUNTS and not bool(((found >= 0) & (found < 2**62)).all()):
            raise CheckpointError(f"{name} is no count")
    elif type(expected) is not type(found):
        raise CheckpointError(
            f"{name} is of type {type(found).__name__} instead of {type(expected).__name__}"
        )
    elif _entries(name) & COUNTS:
        if not is_count(found):
            raise CheckpointError(f"{name} is no count")
    elif _entries(name) & STARTS:
        if not 0 <= found <= expected * (1 + 1e-6):  # a schedule multiplies, and rounds
            raise CheckpointError(f"{name} is {found} instead of {expected} or less")
    elif found != expected:
        raise CheckpointError(f"{name} is {str(found)[:50]} instead of {expected}")


def _entries(name: str) -> set[str]:
    return set(name.split("."))
