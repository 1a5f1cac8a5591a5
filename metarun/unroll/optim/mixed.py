"""Different optimizers for different parameters, where some need more than the gradient."""

from collections.abc import Sequence

from metarun.unroll.names import matcher
from metarun.unroll.optim.base import (
    Derivatives,
    Hyper,
    HyperValue,
    InnerOptimizer,
    LossOptimizer,
    Params,
    State,
)
from metarun.unroll.optim.check import check_optimizer
from metarun.unroll.optim.partition import hyper_of_part, owned_names


def mixed(
    parts: Sequence[tuple[str | Sequence[str], InnerOptimizer | LossOptimizer]],
) -> LossOptimizer:
    """One optimizer of several of either kind; of first-order ones alone, see `partition`.

    All parts move at once, by the derivatives at the same point. The hyperparameters of part i
    are called "i.<name>" ("0.lr", "1.trust_radius"); the state is a tuple with one item a part.

    Args:
        parts: (names or shell-style patterns of parameters, their optimizer). A Hessian is
            taken of a part's own parameters only.

    Returns:
        A `LossOptimizer`.

    Raises:
        ValueError: a part that claims nothing, or a name that two parts list. From `init` and
            `update`, which know the parameters: a parameter that two parts claim or none, or a
            name or pattern that matches nothing.

    Example:
        >>> import torch
        >>> from metarun.unroll import mixed, newton, sgd, unroll
        >>> inner = mixed([("head.*", newton(joint=True)), (["scale"], sgd(lr=0.1))])
        >>> sorted(inner.hyper)[:2]
        ['0.damping', '0.trust_radius']
        >>> def loss(p, step):
        ...     return (p["head.weight"] - 3).square().sum() + p["scale"].square().sum()
        >>> start = {"head.weight": torch.zeros(2), "scale": torch.ones(1)}
        >>> unroll(loss, start, inner, steps=1).params
        {'head.weight': tensor([3., 3.]), 'scale': tensor([0.8000])}
    """
    claims = [(names,) if isinstance(names, str) else tuple(names) for names, _ in parts]
    optimizers = [optimizer for _, optimizer in parts]
    for optimizer in optimizers:
        check_optimizer(optimizer)
    matchers = [matcher(claim) for claim in claims]
    claimed_by: dict[str, int] = {}
    for index, claim in enumerate(claims):
        if not claim:
            raise ValueError(f"part {index} claims no parameters: give it names or patterns")
        for name in claim:
            if claimed_by.setdefault(name, index) != index:
                raise ValueError(f"{name} belongs to part {claimed_by[name]} and to part {index}")

    def split(params: Params) -> list[Params]:
        owned = owned_names(params, matchers)
        return [{name: params[name] for name in names} for names in owned]

    def init(params: Params) -> tuple[State, ...]:
        own = split(params)
        return tuple(o.init(p) for o, p in zip(optimizers, own, strict=True))

    def update(
        derivatives: Derivatives, state: Sequence[State], params: Params, hyper: Hyper
    ) -> tuple[Params, tuple[State, ...]]:
        gradient = derivatives.gradient()
        moved: Params = {}
        states = []
        for index, own in enumerate(split(params)):
            optimizer, part = optimizers[index], hyper_of_part(hyper, index)
            if isinstance(optimizer, LossOptimizer):
                new, new_state = optimizer.update(derivatives, state[index], own, part)
            else:
                grads = {name: gradient[name] for name in own}
                new, new_state = optimizer.update(grads, state[index], own, part)
            moved.update(new)
            states.append(new_state)
        return {name: moved[name] for name in params}, tuple(states)

    hyper: dict[str, HyperValue] = {
        f"{index}.{name}": value
        for index, optimizer in enumerate(optimizers)
        for name, value in optimizer.hyper.items()
    }
    return LossOptimizer(init, update, hyper)
