"""What a component has to give: checked when it is built and where it is called.

A plugin's mistake ends here, in a sentence that says what it gave and what is allowed, and not
in whatever it would lead to in torch.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, Algorithm, Trace
from metarun.episodes.source import EpisodeSource
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, LossOptimizer
from metarun.unroll.advice import explained

FIELDS = ("support_x", "support_y", "query_x", "query_y")
EXTRA = ("loss", "score", "inner_losses")
SPLITS = ("train", "val", "test")


def seen(value: Any) -> str:
    """What a value is, as a message names it."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    short = value is None or isinstance(value, str | int | float | complex | type)
    return f"{value!r:.60}, of type {kind}" if short else f"a value of type {kind}"


def _undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """A block after which the random states are those from before."""
    return torch.random.fork_rng([device.index or 0] if device.type == "cuda" else [])


# ---------------------------------------------------------------- networks and optimizers


def check_network(name: str, model: Any) -> None:
    """Refuse a backbone that is no network with parameters.

    Raises:
        ConfigError: says what it is.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"backbone={name} builds {seen(model)}: it must build an nn.Module")
    if next(model.parameters(), None) is None:
        raise ConfigError(f"backbone={name} has no parameters, so there is nothing to learn")


def check_outputs(name: str, model: nn.Module, source: EpisodeSource) -> None:
    """Refuse a backbone whose output is not what the objective takes, on one episode.

    Raises:
        ConfigError: says what it gives and what it should.
    """
    x = source.sample("train", 0, 1).support_x[0]
    with torch.no_grad(), _undisturbed(x.device), explained():
        outputs = copy.deepcopy(model).to(x.device).eval()(x)
    wanted = (len(x), source.outputs)
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != wanted:
        raise ConfigError(
            f"backbone={name} gives {seen(outputs)} for {len(x)} examples: it must give a tensor "
            f"of shape {wanted}, which is (examples, outputs)"
        )


def check_inner_optimizer(name: str, optimizer: Any) -> None:
    """Refuse what is no inner optimizer.

    Raises:
        ConfigError: says what it is.
    """
    if not isinstance(optimizer, InnerOptimizer | LossOptimizer):
        raise ConfigError(
            f"inner_opt={name} builds {seen(optimizer)}: it must build a "
            "metarun.unroll.InnerOptimizer or LossOptimizer; from_torch makes one of torch's"
        )


def check_outer_optimizer(name: str, optimizer: Any) -> None:
    """Refuse what is no outer optimizer.

    Raises:
        ConfigError: says what it is.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"outer_opt={name} builds {seen(optimizer)}: it must build a torch.optim.Optimizer"
        )


# ---------------------------------------------------------------- data


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
    with _undisturbed(device):
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


# ---------------------------------------------------------------- algorithms


def checked_algorithm(name: str, algorithm: Any) -> Algorithm:
    """The algorithm, whose results are checked at each call; within a recording it costs nothing.

    Raises:
        ConfigError: it is none, or its initial meta-parameters are not tensors by name.
    """
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(
            f"algo={name} builds {seen(algorithm)}: it must build an "
            "Algorithm of metarun.components.algo.base"
        )

    def init() -> dict[str, Tensor]:
        meta = algorithm.init()
        fine = isinstance(meta, Mapping) and len(meta) > 0
        wrong = [k for k, v in meta.items() if not _is_parameter(k, v)] if fine else []
        if not fine or wrong:
            what = f"{wrong[0]!r}: {seen(meta[wrong[0]])}" if wrong else seen(meta)
            raise ConfigError(
                f"algo={name}: init() gives {what}: it must give a dict of one or more "
                "floating-point tensors by name"
            )
        return dict(meta)

    def loss(meta: Any, episode: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return _checked_loss(f"algo={name}: loss(meta, episode)", algorithm.loss(meta, episode))

    def trace(meta: Any, episode: Any) -> Trace:
        return _checked_trace(f"algo={name}: trace(meta, episode)", algorithm.trace(meta, episode))

    return algorithm._replace(init=init, loss=loss, trace=trace)


def _is_parameter(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()


def _checked_loss(what: str, found: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
        raise ConfigError(
            f"{what} gives {seen(found)}: it must give (outer loss, extra), with a dict that has "
            f"{', '.join(map(repr, EXTRA))}"
        )
    value, extra = found
    if unknown := [key for key in extra if key not in EXTRA]:
        raise ConfigError(
            f"{what} gives extra[{unknown[0]!r}], which nothing reads: extra has "
            f"{', '.join(map(repr, EXTRA))} and no other"
        )
    _check_number(f"{what}: the outer loss", value)
    for key in ("loss", "score"):
        if key not in extra:
            raise ConfigError(f"{what} gives no extra[{key!r}]: it must give one")
        _check_number(f"{what}: extra[{key!r}]", extra[key])
    inner = extra.get("inner_losses", value.detach().new_empty(0))
    if not isinstance(inner, Tensor) or inner.dim() != 1:
        raise ConfigError(
            f"{what}: extra['inner_losses'] is {seen(inner)}: it must be a tensor of shape "
            "(inner steps,), or be left out"
        )
    return value, {"loss": extra["loss"], "score": extra["score"], "inner_losses": inner}


def _check_number(what: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise ConfigError(
            f"{what} is {seen(value)}: it must be a tensor with one number and no dimensions"
        )
    if not value.is_floating_point():
        raise ConfigError(f"{what} is {seen(value)}: it must be a floating-point number")


def _checked_trace(what: str, found: Any) -> Trace:
    if not isinstance(found, Trace):
        raise ConfigError(
            f"{what} gives {seen(found)}: it must give a Trace of metarun.components.algo.base"
        )
    for field, value in zip(Trace._fields, found, strict=True):
        if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() == 0:
            raise ConfigError(
                f"{what}: {field} is {seen(value)}: it must be a tensor of shape (inner steps + "
                "1,), from before the first inner step; of shape (1,) without inner steps"
            )
    if len(found.query_loss) != len(found.query_score):
        raise ConfigError(
            f"{what}: query_loss has {len(found.query_loss)} values and query_score "
            f"{len(found.query_score)}: they must be as many"
        )
    return found
