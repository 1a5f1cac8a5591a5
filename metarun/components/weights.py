"""First weights of a backbone from a file of the user's, and which of its parameters are learned.

Either everything that is not a head fits, or nothing is taken.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.components.algo.normalising import PREFIX
from metarun.components.backbone.norm import BatchNorm, Moments
from metarun.components.weights_file import Content, read_weights
from metarun.errors import ConfigError
from metarun.unroll import match_names

log = logging.getLogger(__name__)

HEAD = "head."
HEADS = (HEAD, "heads.", "fc.", "classifier.", "linear.", "logits.", "last_linear.")
"""What begins the names of a classifier's last layer in the files of the field."""

AROUND = ("module.", "model.", "encoder.", "backbone.", "features.", "feature.", "net.")
"""What codes put before the names of a backbone that they have wrapped."""

AVERAGES = (MEAN := "running_mean", VARIANCE := "running_var")
UNUSED = "num_batches_tracked"


class _Fit(NamedTuple):
    """What of a file belongs where.

    Attributes:
        found: tensors by their names here.
        averages: running mean and variance by layer.
        left_out: names in the file of what is not taken.
        problems: what does not fit; with any, nothing is taken.
    """

    found: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    left_out: list[str]
    problems: list[str]


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Have the parameters that match `backbone.frozen` not learned.

    Raises:
        ConfigError: a pattern matches none, or nothing is left to learn.
    """
    if not patterns:
        return
    try:
        chosen = set(match_names([name for name, _ in model.named_parameters()], patterns))
    except ValueError as error:
        raise ConfigError(f"backbone.frozen: {error}") from error
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"backbone.frozen={patterns} leaves nothing to learn: freeze less, e.g. ['body.*']"
        )


def load_weights(model: nn.Module, path: str) -> None:
    """Give a model the weights in a file.

    Names may have what other codes put before them ("module.", "encoder."), and lack the "body."
    of ours. A head of another shape, or of another name, is left out and stays as it was drawn.
    Running statistics become what the moving averages of `backbone.norm=running` begin with.

    Args:
        model: the backbone; `model.head_in_files` may say how its library calls the head.
        path: the file, or the directory of a run, whose best checkpoint is meant.

    Raises:
        ConfigError: there is no such file, it cannot be read as weights, or the weights are not
            those of this network.
    """
    content = read_weights(path)
    fit = _fitted(model, content)
    if fit.problems:
        raise ConfigError(
            f"backbone.weights={path}: nothing was loaded, since these are not the weights of "
            f"this network; {'; '.join(fit.problems)}. Choose the backbone and the settings that "
            "they were trained with"
        )
    targets, layers = _targets(model), _layers(model)
    with torch.no_grad():
        for name, value in fit.found.items():
            targets[name].copy_(value)
    for name, each in fit.averages.items():
        layers[name].averages = Moments(each[MEAN], each[VARIANCE], 0)
    drawn = _without_those_of(targets, fit.found)
    log.info(
        "backbone.weights=%s (sha256 %s…): %d tensors%s%s",
        path,
        content.digest[:12],
        len(fit.found),
        f"; not taken: {_some(fit.left_out)}" if fit.left_out else "",
        f"; as drawn: {_some(drawn)}" if drawn else "",
    )


def _targets(model: nn.Module) -> dict[str, Tensor]:
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return targets


def _layers(model: nn.Module) -> dict[str, BatchNorm]:
    return {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}


def _without_those_of(targets: dict[str, Tensor], names: Iterable[str]) -> list[str]:
    """The names of all other tensors; one may have several names."""
    taken = {id(targets[name]) for name in names if name in targets}
    return [name for name, value in targets.items() if id(value) not in taken]


def _fitted(model: nn.Module, content: Content) -> _Fit:
    """Where each tensor of a file belongs."""
    targets, layers = _targets(model), _layers(model)
    own_head = getattr(model, "head_in_files", None)
    found: dict[str, Tensor] = {}
    averages: dict[str, dict[str, Tensor]] = {}
    left_out: list[str] = []
    unknown: list[str] = []
    misfits: dict[str, str] = {}
    for name, value in content.tensors.items():
        place = _place(name, targets, layers, own_head)
        if place is None:
            if name.rpartition(".")[2] != UNUSED:
                foreign = content.ours or _is_head(name, own_head)
                (left_out if foreign else unknown).append(name)
        elif place not in targets:
            owner, _, part = place.rpartition(".")
            averages.setdefault(owner, {})[part] = value
        elif place in found:
            unknown.append(f"{name} (a second {place})")
        elif targets[place].shape == value.shape:
            found[place] = value
        elif place.startswith(HEAD):
            left_out.append(name)
        else:
            there, here = tuple(value.shape), tuple(targets[place].shape)
            misfits[place] = f"{name} is {there} there and {here} here"
    if content.ours:
        averages |= _moving_averages(content.tensors, layers)
        left_out = [name for name in left_out if not name.startswith(PREFIX)]
    averages = {name: each for name, each in averages.items() if len(each) == len(AVERAGES)}
    for name, each in averages.items():
        if any(value.shape != layers[name].bias.shape for value in each.values()):
            misfits[name] = f"the running statistics of {name}"
    missing = _without_those_of(targets, [*found, *misfits])
    lists = {
        "of another shape": list(misfits.values()),
        "not in the file": [name for name in missing if not name.startswith(HEAD)],
        "not in the network": unknown,
    }
    problems = [f"{what}: {_some(names)}" for what, names in lists.items() if names]
    return _Fit(found, averages, left_out, problems)


def _place(
    name: str, targets: Mapping[str, Any], layers: Mapping[str, BatchNorm], own_head: str | None
) -> str | None:
    """What a name in a file is called here; None: nothing that is here."""
    for short in _without_surroundings(name):
        if own_head is not None and short.startswith(own_head):
            short = HEAD + short.removeprefix(own_head)
        for candidate in (short, f"body.{short}"):
            owner, _, part = candidate.rpartition(".")
            if candidate in targets or (part in AVERAGES and owner in layers):
                return candidate
    return None


def _without_surroundings(name: str) -> Iterable[str]:
    """A name, and what is left of it without each of the words before it."""
    yield name
    while before := next((word for word in AROUND if name.startswith(word)), None):
        name = name.removeprefix(before)
        yield name


def _is_head(name: str, own_head: str | None) -> bool:
    heads = HEADS if own_head is None else (*HEADS, own_head)
    return any(short.startswith(heads) for short in _without_surroundings(name))


def _moving_averages(
    tensors: Mapping[str, Tensor], layers: Mapping[str, BatchNorm]
) -> dict[str, dict[str, Tensor]]:
    """What a run with `backbone.norm=running` has kept, by the layer's name."""
    return {
        layer: {MEAN: tensors[f"{PREFIX}{i}.mean"], VARIANCE: tensors[f"{PREFIX}{i}.var"]}
        for i, layer in enumerate(layers)
        if f"{PREFIX}{i}.mean" in tensors and f"{PREFIX}{i}.var" in tensors
    }


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
