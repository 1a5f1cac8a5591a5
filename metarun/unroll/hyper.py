"""Hyperparameters by parameter group, and inner hyperparameters that are themselves learned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metarun.unroll.names import match_names, selects
from metarun.unroll.optim.base import Hyper, HyperValue, Params

Granularity = Literal["global", "parameter", "step", "parameter_step"]
"""What has a learned value of its own; see `learn_hyper`."""

Groups = Mapping[str, Mapping[str, float]]
"""Name pattern -> hyperparameters, such as {"head.*": {"lr": 0.1}}. The first match counts."""


def group_hyper(
    defaults: Mapping[str, HyperValue], groups: Groups, names: Sequence[str]
) -> dict[str, HyperValue]:
    """Hyperparameters with the values of each group in place of the defaults.

    Args:
        defaults: an optimizer's hyperparameters, each one value for all parameters.
        groups: name pattern -> hyperparameters. The first pattern that matches a parameter and
            has the hyperparameter counts.
        names: the parameters' names.

    Returns:
        The hyperparameters. One that a group sets has a value by parameter name.

    Raises:
        ValueError: a pattern matches no parameter, or a group sets what is no hyperparameter or
            has a value by parameter name already.

    Example:
        >>> from metarun.unroll import group_hyper, sgd
        >>> names = ["body.weight", "head.weight"]
        >>> hyper = group_hyper(sgd(lr=0.01).hyper, {"head.*": {"lr": 0.1}}, names)
        >>> hyper["lr"], hyper["momentum"]
        ({'body.weight': 0.01, 'head.weight': 0.1}, 0.0)
    """
    match_names(names, list(groups))
    unknown = {key for group in groups.values() for key in group} - set(defaults)
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: not a setting of this inner optimizer, which has "
            f"{', '.join(defaults)}"
        )
    grouped: dict[str, HyperValue] = dict(defaults)
    for hyper in {key for group in groups.values() for key in group}:
        default = defaults[hyper]
        if isinstance(default, Mapping):
            raise ValueError(f"{hyper} is set for each parameter already")
        grouped[hyper] = {
            name: default if label is None else groups[label][hyper]
            for name, label in _labels(hyper, groups, names).items()
        }
    return grouped


class LearnedHyper(NamedTuple):
    """Hyperparameters of which some are meta-parameters; `learn_hyper` makes and shows one.

    Attributes:
        initial: the meta-parameters' initial values, by key: "lr", or "lr/<parameter or
            pattern>"; of the shape of the value to start from, () for a number, and with a
            first dimension of steps where each inner step has its own.
        at: `at(learned, step) -> hyper` for an inner step. Steps beyond the last learned one
            use that one's values.
    """

    initial: dict[str, Tensor]
    at: Callable[[Mapping[str, Tensor], int], Hyper]


def learn_hyper(
    hyper: Mapping[str, HyperValue],
    learn: Sequence[str],
    granularity: Granularity,
    params: Params,
    steps: int,
    groups: Groups | None = None,
) -> LearnedHyper:
    """Make the hyperparameters named in `learn` meta-parameters.

    Args:
        hyper: the values to start from (after `group_hyper`). Where a hyperparameter has
            values by parameter name for some parameters only, it is learned for these.
        learn: names in `hyper`.
        granularity: "global" learns one value (one for each group that sets it), "parameter"
            one for each parameter tensor, "step" one for each inner step, "parameter_step"
            both (the LSLR of MAML++, Antoniou et al. 2019).
        params: the parameters that are adapted; their dtype and device are used.
        steps: inner steps in training, for the granularities by step.
        groups: the groups that `hyper` was made with.

    Returns:
        Their initial values, and the hyperparameters of a step as a function of learned values.

    Raises:
        ValueError: an unknown granularity or name, `learn` a string, a granularity by step with no
            steps, a value to start from that is infinite, one learned value in place of several
            that differ, or no parameter with a value.

    Example:
        >>> import torch
        >>> from metarun.unroll import learn_hyper, sgd, unroll
        >>> params, optimizer = {"w": torch.zeros(1)}, sgd(lr=0.1)
        >>> learned = learn_hyper(optimizer.hyper, ["lr"], "parameter_step", params, steps=2)
        >>> values = {key: x.requires_grad_() for key, x in learned.initial.items()}
        >>> values
        {'lr/w': tensor([0.1000, 0.1000], requires_grad=True)}
        >>> end = unroll(
        ...     lambda p, step: (p["w"] - 3).square().sum(),
        ...     params,
        ...     optimizer,
        ...     steps=2,
        ...     hyper=lambda step: learned.at(values, step),
        ... )
        >>> torch.autograd.grad(end.params["w"].sum(), values["lr/w"])
        (tensor([4.8000, 4.8000]),)

    References:
        Antoniou, Edwards and Storkey 2019, How to train your MAML (granularity by step).
        Li et al. 2017, Meta-SGD: learning to learn quickly for few-shot learning (learned rates).
    """
    if isinstance(learn, str):
        raise ValueError(f"learn={learn!r}: give a list of names, such as [{learn!r}]")
    if granularity not in get_args(Granularity):
        allowed = ", ".join(get_args(Granularity))
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {allowed}")
    for name in learn:
        if name not in hyper:
            raise ValueError(f"cannot learn {name!r}: choose from {', '.join(hyper)}")
    by_step = granularity in ("step", "parameter_step")
    if by_step and learn and steps < 1:
        raise ValueError(f"granularity {granularity!r} needs 1 inner step or more")
    by_parameter = granularity in ("parameter", "parameter_step")
    keys: dict[str, dict[str, str]] = {}  # hyperparameter -> parameter -> key in `initial`
    initial: dict[str, Tensor] = {}
    for name in learn:
        value = hyper[name]
        given = [p for p in params if not isinstance(value, Mapping) or p in value]
        if not given:
            raise ValueError(f"cannot learn {name!r}: no parameter has a value of it")
        if by_parameter:
            keys[name] = {p: f"{name}/{p}" for p in given}
        else:
            labels = _labels(name, groups or {}, given)
            keys[name] = {p: name if g is None else f"{name}/{g}" for p, g in labels.items()}
        stands_for: dict[str, Tensor] = {}
        for p, key in keys[name].items():
            base = value[p] if isinstance(value, Mapping) else value
            start = torch.as_tensor(base, dtype=torch.float64).detach()
            if not start.isfinite().all():
                raise ValueError(f"cannot learn {name!r} from {base}: give it a finite value")
            if not torch.equal(stands_for.setdefault(key, start).cpu(), start.cpu()):
                raise ValueError(
                    f"cannot learn one {key!r} in place of values that differ, as that of {p} "
                    "does: pass the groups that they come from, or choose granularity "
                    f"{'parameter_step' if by_step else 'parameter'!r}"
                )
            start = start.to(params[p].device, params[p].dtype.to_real())
            initial[key] = start.expand(steps, *start.shape).clone() if by_step else start.clone()

    def at(learned: Mapping[str, Tensor], step: int) -> Hyper:
        chosen = {
            name: {
                p: learned[key][min(step, steps - 1)] if by_step else learned[key]
                for p, key in of_parameter.items()
            }
            for name, of_parameter in keys.items()
        }
        return {**hyper, **chosen}

    return LearnedHyper(initial, at)


def _labels(hyper: str, groups: Groups, names: Sequence[str]) -> dict[str, str | None]:
    """For each parameter the pattern of the group that sets `hyper` for it, or None."""
    return {
        name: next(
            (
                pattern
                for pattern, group in groups.items()
                if selects(pattern, name, names) and hyper in group
            ),
            None,
        )
        for name in names
    }
