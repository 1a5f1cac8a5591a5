"""The inner optimizer's state as tensors by name, where it goes on from meta-step to meta-step."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from metarun.unroll import InnerOptimizer, LossOptimizer, Meta, Params
from metarun.unroll._torch import pytree

PREFIX = "moments."
"""Begins the names of the state's tensors among what is kept."""


class Carried(NamedTuple):
    """An optimizer's state among the kept tensors of an algorithm.

    Attributes:
        initial: the tensors of a fresh state, by name.
        state: `state(meta)`, the state out of what is kept; constants.
        values: `values(state)`, the tensors of a state by name.
    """

    initial: dict[str, Tensor]
    state: Callable[[Meta], Any]
    values: Callable[[Any], dict[str, Tensor]]


def carried_state(optimizer: InnerOptimizer | LossOptimizer, params: Params) -> Carried:
    """The state of an optimizer over some parameters.

    Args:
        optimizer: the inner optimizer, behind its preconditioner.
        params: what it changes.
    """
    leaves, structure = pytree.tree_flatten_with_path(optimizer.init(params))
    names = [f"{PREFIX}{pytree.keystr(path)}" for path, _ in leaves]

    def state(meta: Meta) -> Any:
        return pytree.tree_unflatten([meta[name].detach() for name in names], structure)

    def values(of: Any) -> dict[str, Tensor]:
        return dict(zip(names, pytree.tree_leaves(of), strict=True))

    return Carried(dict(zip(names, (leaf for _, leaf in leaves), strict=True)), state, values)
