"""Which parameters share an outer learning rate, and are decayed."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from metarun.components.algo.base import HYPERPARAMETERS
from metarun.components.outer_opt.base import OuterOptConfig
from metarun.errors import ConfigError
from metarun.unroll import match_names
from metarun.unroll.names import selects


def outer_groups(options: OuterOptConfig, learned: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The param groups of the outer optimizer, in torch's form.

    Weights come first, then learned hyperparameters, which are not decayed; then, for each of
    `outer_opt.groups`, those of both that it takes, with its learning rate.

    Args:
        options: the outer optimizer's settings.
        learned: the parameters by name.

    Raises:
        ConfigError: see `group_of_each`.
    """
    owners, groups = group_of_each(options, learned), []
    for number in (None, *range(len(options.groups))):
        own = {name: value for name, value in learned.items() if owners[name] == number}
        rate: dict[str, Any] = {}
        if number is not None:
            rate = {"lr": options.lr * options.groups[number]["lr_factor"]}
        weights = [v for name, v in own.items() if not name.startswith(HYPERPARAMETERS)]
        hyper = [v for name, v in own.items() if name.startswith(HYPERPARAMETERS)]
        if weights or number is None:
            groups.append({"params": weights, **rate})
        if hyper:  # decaying a learning rate towards zero is never what weight decay is for
            groups.append({"params": hyper, "weight_decay": 0.0, **rate})
    return groups


def group_of_each(options: OuterOptConfig, learned: Iterable[str]) -> dict[str, int | None]:
    """Which of `outer_opt.groups` each parameter is in: the first whose pattern matches, or none.

    Raises:
        ConfigError: a pattern matches no parameter that is learned, or only such as are in an
            earlier group.
    """
    names, patterns = list(learned), [group["params"] for group in options.groups]
    try:
        match_names(names, patterns)
    except ValueError as error:
        raise ConfigError(f"outer_opt.groups: {error}") from error
    owners = {
        name: next((i for i, p in enumerate(patterns) if selects(p, name, names)), None)
        for name in names
    }
    for number, pattern in enumerate(patterns):
        if number not in owners.values():
            raise ConfigError(
                f"outer_opt.groups: all that {pattern!r} matches is in an earlier group; leave one "
                "out, or put the narrower pattern first"
            )
    return owners
