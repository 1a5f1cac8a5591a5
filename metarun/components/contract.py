"""What a component has to give: checked when it is built and where it is called.

A plugin's mistake ends here, in a sentence that says what it gave and what is allowed, and not
in whatever it would lead to in torch.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from metarun.components.algo.base import Algorithm, Trace
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.source import EpisodeSource, an_episode
from metarun.errors import ConfigError
from metarun.unroll import InnerOptimizer, LossOptimizer
from metarun.unroll.advice import explained

EXTRA = ("loss", "score", "inner_losses", "kept", "metrics")
LOGGED = ("loss", "score", "accuracy", "mse", "skipped")
"""What the log of training calls `train/…` already."""


def seen(value: Any) -> str:
    """What a value is, as a message names it."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    short = value is None or isinstance(value, str | int | float | complex | type)
    return f"{value!r:.60}, of type {kind}" if short else f"a value of type {kind}"


def undisturbed(device: torch.device) -> AbstractContextManager[None]:
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
    given: Any = an_episode(source)
    x = given.x if isinstance(source, LabelledExamples) else given.support_x[0]
    with torch.no_grad(), undisturbed(x.device), explained():
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

    given = ("meta", "episode", *(["step"] if algorithm.follows_step else []))
    try:
        inspect.signature(algorithm.loss).bind(*given)
    except TypeError as error:
        raise ConfigError(
            f"algo={name}: its loss must take ({', '.join(given)}), but {error}; "
            "Algorithm.follows_step says whether it takes a step"
        ) from error

    def init() -> dict[str, Tensor]:
        meta = algorithm.init()
        if isinstance(meta, Mapping) and not meta and algorithm.learns:
            raise ConfigError(
                f"algo={name} has nothing to learn: what it uses of the backbone has no parameters "
                "or frozen ones (backbone.frozen, requires_grad=False); freeze less, or take "
                "another backbone"
            )
        fine = isinstance(meta, Mapping) and (len(meta) > 0 or not algorithm.learns)
        wrong = [k for k, v in meta.items() if not _is_parameter(k, v)] if fine else []
        if not fine or wrong:
            what = f"{wrong[0]!r}: {seen(meta[wrong[0]])}" if wrong else seen(meta)
            raise ConfigError(
                f"algo={name}: init() gives {what}: it must give a dict of one or more "
                "floating-point tensors by name"
            )
        return dict(meta)

    one = algorithm.one_model
    of_loss = algorithm.kept if one is None or one.advance is None else ()

    def loss(meta: Any, episode: Any, *step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = algorithm.loss(meta, episode, *step)
        return _checked_loss(f"algo={name}: loss(meta, episode)", found, of_loss)

    def trace(meta: Any, episode: Any) -> Trace:
        found = algorithm.trace(meta, episode)
        if one is not None:
            return _checked_traces(f"algo={name}: trace(meta, batch)", found, len(episode.y))
        return _checked_trace(f"algo={name}: trace(meta, episode)", found)

    def advance(meta: Any, given: Any) -> dict[str, Tensor]:
        assert one is not None and one.advance is not None
        what = f"algo={name}: advance(meta, batch)"
        return _checked_kept(what, one.advance(meta, given), algorithm.kept)

    checked: Algorithm = algorithm._replace(init=init, loss=loss, trace=trace)
    if one is not None and one.advance is not None:
        return checked._replace(one_model=one._replace(advance=advance))
    return checked


def check_predictions(outputs: Any, queries: int) -> None:
    """Refuse what no objective takes.

    Raises:
        ConfigError: it says what a predictor gives.
    """
    fits = isinstance(outputs, Tensor) and outputs.dim() == 2 and len(outputs) == queries
    if not fits or not outputs.is_floating_point():
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        kind = f" of {outputs.dtype}" if isinstance(outputs, Tensor) else ""
        raise ConfigError(
            f"the algorithm's predictor gives {shape}{kind} for {queries} queries: it must give "
            "floating-point scores or values of shape (queries, outputs)"
        )


def _is_parameter(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()


def _checked_loss(what: str, found: Any, kept: Sequence[str] = ()) -> tuple[Tensor, dict[str, Any]]:
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
        raise ConfigError(
            f"{what} gives {seen(found)}: it must give (outer loss, extra), with a dict that has "
            f"{', '.join(map(repr, EXTRA[:3]))}"
        )
    value, extra = found
    if unknown := [key for key in extra if key not in EXTRA]:
        raise ConfigError(
            f"{what} gives extra[{unknown[0]!r}], which nothing reads: extra has "
            f"{', '.join(map(repr, EXTRA))} and no other"
        )
    _check_number(f"{what}: the outer loss", value)
    for key in ("loss", "score", *(["kept"] if kept else [])):
        if key not in extra:
            raise ConfigError(f"{what} gives no extra[{key!r}]: it must give one")
        if key != "kept":
            _check_number(f"{what}: extra[{key!r}]", extra[key])
    inner = extra.get("inner_losses", value.detach().new_empty(0))
    if not isinstance(inner, Tensor) or inner.dim() != 1:
        raise ConfigError(
            f"{what}: extra['inner_losses'] is {seen(inner)}: it must be a tensor of shape "
            "(inner steps,), or be left out"
        )
    checked = {"loss": extra["loss"], "score": extra["score"], "inner_losses": inner}
    if "metrics" in extra:
        checked["metrics"] = _checked_metrics(what, extra["metrics"])
    if kept:
        checked["kept"] = _checked_kept(f"{what}: extra['kept']", extra["kept"], kept)
    return value, checked


def _checked_metrics(what: str, given: Any) -> dict[str, Tensor]:
    if not isinstance(given, Mapping) or any(not isinstance(name, str) for name in given):
        raise ConfigError(f"{what}: extra['metrics'] is {seen(given)}: it must be a dict by name")
    for name, value in given.items():
        if name in LOGGED:
            raise ConfigError(f"{what}: extra['metrics'] has {name!r}, which is logged already")
        _check_number(f"{what}: extra['metrics'][{name!r}]", value)
    return {name: value.detach() for name, value in given.items()}


def _checked_kept(what: str, given: Any, kept: Sequence[str]) -> dict[str, Tensor]:
    if not isinstance(given, Mapping) or set(given) != set(kept):
        raise ConfigError(
            f"{what} is {seen(given)}: it must be a dict with the next values of {', '.join(kept)}"
        )
    return {name: given[name].detach() for name in kept}


def _check_number(what: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise ConfigError(
            f"{what} is {seen(value)}: it must be a tensor with one number and no dimensions"
        )
    if not value.is_floating_point():
        raise ConfigError(f"{what} is {seen(value)}: it must be a floating-point number")


def _checked_traces(what: str, found: Any, examples: int) -> Trace:
    if not isinstance(found, Trace):
        return _checked_trace(what, found)
    for field, value in zip(Trace._fields, found, strict=True):
        if not isinstance(value, Tensor) or value.shape != (examples, 1):
            raise ConfigError(
                f"{what}: {field} is {seen(value)}: of {examples} examples it must be a tensor of "
                f"shape ({examples}, 1)"
            )
    return found


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
