"""What a source of episodes has to give: checked when it is built, and whenever it fails."""

from typing import Any

import torch
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES
from metarun.components.contract import seen, undisturbed
from metarun.errors import ConfigError

FIELDS = ("support_x", "support_y", "query_x", "query_y")
SPLITS = ("train", "val", "test")


def check_source(name: str, source: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a source of episodes that is not described, or whose episodes are not as described.

    One episode of each split is drawn, and one of them twice, in other company: an episode is a
    function of its split and its number alone.

    Raises:
        ConfigError: says what it gives and what it should.
    """
    lacking = [a for a in ("kind", "input_shape", "outputs", "sample") if not hasattr(source, a)]
    if lacking:
        raise ConfigError(
            f"data={name} builds {seen(source)} without `{lacking[0]}`: it must have kind, "
            "input_shape, outputs and sample(split, start, count)"
        )
    if source.kind not in OBJECTIVES:
        raise ConfigError(f"data={name} is of kind {source.kind!r}: {' or '.join(OBJECTIVES)}")
    if type(source.outputs) is not int or source.outputs < 1:
        raise ConfigError(f"data={name} has outputs={source.outputs!r}: must be 1 or more")
    shape = source.input_shape
    if not isinstance(shape, tuple | list | torch.Size) or not all(type(n) is int for n in shape):
        raise ConfigError(f"data={name} has input_shape={shape!r}: must be a tuple of numbers")
    if not isinstance(getattr(source, "identity", ""), str | None):
        raise ConfigError(f"data={name} has identity={seen(source.identity)}: must be a text")
    with undisturbed(device):
        for split in SPLITS:
            two = _drawn(name, source, split, 0, 2)
            _check_episodes(f"data={name}: sample({split!r}, 0, 2)", two, source, 2, device, dtype)
        second = _drawn(name, source, split, 1, 1)
        for field in FIELDS:
            again, first = getattr(second, field)[0], getattr(two, field)[1]
            if again.shape != first.shape or not torch.allclose(again, first, equal_nan=True):
                raise ConfigError(
                    f"data={name}: episode 1 of the {split} split is another one when it is drawn "
                    f"again (its {field} differs): an episode must depend on its split, its number "
                    "and the seed alone"
                )


class CheckedSource:
    """A user's source of episodes, whose failures are told as such whenever they come."""

    def __init__(self, name: str, source: Any) -> None:
        self._name, self._source = name, source

    def sample(self, split: str, start: int, count: int) -> Any:
        """The source's episodes.

        Raises:
            ConfigError: it fails, or gives no episodes.
        """
        episodes = _drawn(self._name, self._source, split, start, count)
        if not isinstance(episodes, tuple) or any(not hasattr(episodes, f) for f in FIELDS):
            raise ConfigError(
                f"data={self._name}: sample({split!r}, {start}, {count}) gives {seen(episodes)}, "
                "no episodes"
            )
        return episodes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _drawn(name: str, source: Any, split: str, start: int, count: int) -> Any:
    try:
        return source.sample(split, start, count)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's source may do wrong
        raise ConfigError(
            f"data={name}: sample({split!r}, {start}, {count}) ends in {type(error).__name__}: "
            f"{error}; there must be episodes of each split: {', '.join(SPLITS)}"
        ) from error


def _check_episodes(
    what: str, episodes: Any, source: Any, count: int, device: torch.device, dtype: torch.dtype
) -> None:
    if not isinstance(episodes, tuple) or any(not hasattr(episodes, f) for f in FIELDS):
        raise ConfigError(
            f"{what} gives {seen(episodes)}: it must give metarun.episodes.source.Episodes, or a "
            f"NamedTuple that begins with {', '.join(FIELDS)}"
        )
    for field, value in zip(episodes._fields, episodes, strict=True):  # type: ignore[attr-defined]
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != count:
            raise ConfigError(
                f"{what}: {field} is {seen(value)}: it must be a tensor with {count} tasks as its "
                "first dimension"
            )
        if value.device.type != device.type:
            raise ConfigError(f"{what}: {field} is on {value.device}: it must be on {device}")
        if value.is_floating_point() and value.dtype != dtype:
            raise ConfigError(
                f"{what}: {field} is {seen(value)}: it must be of the run's dtype, {dtype}"
            )
    for half in ("support", "query"):
        x, y = getattr(episodes, f"{half}_x"), getattr(episodes, f"{half}_y")
        inputs = tuple(source.input_shape)
        if tuple(x.shape[2:]) != inputs:
            raise ConfigError(
                f"{what}: {half}_x is {seen(x)}: it must be (tasks, examples, *input_shape), and "
                f"input_shape is {inputs}"
            )
        _check_targets(f"{what}: {half}_y", y, x.shape[1], source)


def _check_targets(what: str, y: Tensor, examples: int, source: Any) -> None:
    if source.kind == "regression":
        if y.shape[1:] != (examples, source.outputs) or not y.is_floating_point():
            raise ConfigError(
                f"{what} is {seen(y)}: targets must be floating-point numbers of shape (tasks, "
                f"{examples}, {source.outputs}), which is (tasks, examples, outputs)"
            )
        return
    if y.shape[1:] != (examples,) or y.dtype is not torch.int64:
        raise ConfigError(
            f"{what} is {seen(y)}: labels must be int64 of shape (tasks, {examples}), which is "
            "(tasks, examples)"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= source.outputs:
        raise ConfigError(
            f"{what} has labels from {low} to {high}, but outputs={source.outputs}: labels go from "
            f"0 to {source.outputs - 1}"
        )
