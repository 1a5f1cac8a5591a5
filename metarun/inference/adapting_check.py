"""What may be wrong with the examples of a task that a person gives, in words."""

from typing import Any

import torch
from torch import Tensor

from metarun.components.algo.padding import known, present
from metarun.components.build import dtype_of
from metarun.episodes.source import is_uneven
from metarun.training.setup import Setup


def refuse_inputs(setup: Setup, what: str, x: Any) -> None:
    """Refuse what a run's network does not take.

    Args:
        setup: of the run.
        what: what the inputs are called.
        x: what was given as inputs.

    Raises:
        ValueError: it is no tensor, or of another shape, type or device.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{what} is a {type(x).__name__}: give a tensor, torch.as_tensor(…)")
    shape = tuple(setup.source.input_shape)
    if tuple(x.shape[1:]) != shape or x.ndim == 0:
        raise ValueError(
            f"{what} has the shape {tuple(x.shape)}: the run's network takes ({what}, "
            f"{', '.join(map(str, shape))})"
        )
    if x.dtype != (dtype := dtype_of(setup.config)):
        own = ", of pixels by trained.to_inputs" if x.dtype == torch.uint8 else ""
        raise ValueError(f"{what} is {x.dtype}: make it {dtype}, as the run's network is{own}")
    if x.device.type != setup.device.type:
        raise ValueError(f"{what} is on {x.device}, and the run's network on {setup.device}")


def refuse_labels(setup: Setup, y: Any, examples: int, way: int) -> None:
    """Refuse labels that are none of the examples of a task.

    Tasks of a run of uneven tasks may lack classes, and have padding (`metarun.episodes.uneven`).
    Targets of a regression may be any.

    Args:
        setup: of the run.
        y: what was given as labels.
        examples: how many examples there are.
        way: how many classes there are.

    Raises:
        ValueError: they are no tensor of whole numbers, not as many as the examples, none of the
            classes, or a class has no example.
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"labels are a {type(y).__name__}: give a tensor, torch.as_tensor(…)")
    if y.ndim == 0 or len(y) != examples:
        raise ValueError(f"there are {examples} examples and {len(y) if y.ndim else 1} labels")
    if setup.source.kind != "classification":
        return
    if y.ndim != 1 or y.dtype != torch.int64:
        raise ValueError(
            f"labels are {y.dtype} of the shape {tuple(y.shape)}: give int64 (examples,)"
        )
    uneven = is_uneven(setup.source)
    own = y[known(y)] if uneven else y
    wrong = own[(own < 0) | (own >= way)]
    if len(wrong):
        raise ValueError(
            f"labels are from 0 to {way - 1} in a task of {way} classes, and here is "
            f"{int(wrong[0])}"
        )
    if not len(own) or not (uneven or present(own, way).all()):
        lacking = [label for label in range(way) if not (own == label).any()]
        raise ValueError(f"class {lacking[0]} of {way} has no example: give one at least")
