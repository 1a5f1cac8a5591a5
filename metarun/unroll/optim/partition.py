"""Different inner optimizers for different parameters."""

from collections.abc import Callable, Iterable, Sequence

from metarun.unroll.names import matcher
from metarun.unroll.optim.base import (
    Hyper,
    HyperValue,
    InnerOptimizer,
    LossOptimizer,
    Params,
    State,
)
from metarun.unroll.optim.check import check_optimizer


def partition(parts: Sequence[tuple[str | Sequence[str], InnerOptimizer]]) -> InnerOptimizer:
    """One optimizer of several, each for the parameters that its names or patterns match.

    The hyperparameters of part i are called "i.<name>" ("0.lr", "1.momentum"); the state is a
    tuple with one item a part. Where a part needs more than the gradient, see `mixed`.

    Args:
        parts: (names or shell-style patterns, optimizer). A name written in full stands for
            itself, whatever characters it has. A part without names owns nothing.

    Returns:
        An `InnerOptimizer`.

    Raises:
        ValueError: a part that is no `InnerOptimizer`. From `init` and `update`, which know the
            parameters: a parameter belongs to two parts or to none, or a name or pattern matches
            nothing.

    Example:
        >>> import torch
        >>> from metarun.unroll import partition, sgd, unroll
        >>> inner = partition([("body.*", sgd(lr=0.0)), ("head.*", sgd(lr=0.5))])
        >>> inner.hyper["1.lr"]
        0.5
        >>> start = {"body.weight": torch.ones(2), "head.weight": torch.ones(2)}
        >>> unroll(lambda p, step: sum(x.sum() for x in p.values()), start, inner, 1).params
        {'body.weight': tensor([1., 1.]), 'head.weight': tensor([0.5000, 0.5000])}
    """
    matchers = [matcher((names,) if isinstance(names, str) else names) for names, _ in parts]
    optimizers = [optimizer for _, optimizer in parts]
    for index, optimizer in enumerate(optimizers):
        check_optimizer(optimizer)
        if isinstance(optimizer, LossOptimizer):
            raise ValueError(
                f"part {index} takes more of the loss than its gradient: use mixed in place of "
                "partition, with the same parts"
            )

    def init(params: Params) -> tuple[State, ...]:
        return tuple(
            optimizer.init({name: params[name] for name in names})
            for optimizer, names in zip(optimizers, owned_names(params, matchers), strict=True)
        )

    def update(
        grads: Params, state: Sequence[State], params: Params, hyper: Hyper
    ) -> tuple[Params, tuple[State, ...]]:
        moved: Params = {}
        states = []
        for index, names in enumerate(owned_names(params, matchers)):
            new_params, new_state = optimizers[index].update(
                {name: grads[name] for name in names},
                state[index],
                {name: params[name] for name in names},
                hyper_of_part(hyper, index),
            )
            moved.update(new_params)
            states.append(new_state)
        return {name: moved[name] for name in params}, tuple(states)

    hyper: dict[str, HyperValue] = {
        f"{index}.{name}": value
        for index, optimizer in enumerate(optimizers)
        for name, value in optimizer.hyper.items()
    }
    return InnerOptimizer(init, update, hyper)


def owned_names(
    names: Iterable[str], matchers: Sequence[Callable[[Iterable[str]], list[str]]]
) -> list[list[str]]:
    """The names that each part owns, by its `matcher`.

    Raises:
        ValueError: a name belongs to two parts or to none, or a pattern matches nothing.
    """
    owners: dict[str, int] = {}
    names = list(names)
    parts = [matched(names) for matched in matchers]
    for index, part in enumerate(parts):
        for name in part:
            if name in owners:
                raise ValueError(f"{name} belongs to part {owners[name]} and to part {index}")
            owners[name] = index
    missing = [name for name in names if name not in owners]
    if missing:
        raise ValueError(f"no part of the partition matches {', '.join(missing)}")
    return parts


def hyper_of_part(hyper: Hyper, index: int) -> Hyper:
    """The hyperparameters of a part, by the names that its optimizer knows."""
    prefix = f"{index}."
    return {k.removeprefix(prefix): v for k, v in hyper.items() if k.startswith(prefix)}
