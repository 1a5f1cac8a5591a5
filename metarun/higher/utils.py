"""Helpers of the `higher` interface for nested structures and for parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["flatten", "get_func_params"]


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dicts (their values), lists, tuples and sets, in order.

    Args:
        x: the structure; anything else is a leaf.

    Returns:
        The leaves.

    Example:
        >>> from metarun.higher.utils import flatten
        >>> flatten({"lr": 0.1, "betas": (0.9, 0.999)})
        [0.1, 0.9, 0.999]
    """
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in flatten(value)]
    if isinstance(x, list | tuple | set):
        return [leaf for value in x for leaf in flatten(value)]
    return [x]


def map_leaves(fn: Callable[[Any], Any], x: Any) -> Any:
    """The same nesting of dicts, lists, tuples and sets, with `fn` applied to each leaf."""
    if isinstance(x, dict):
        return {key: map_leaves(fn, value) for key, value in x.items()}
    if isinstance(x, list | tuple | set):
        return type(x)(map_leaves(fn, value) for value in x)
    return fn(x)


def copy_tensor(x: Tensor, device: torch.device | str | None) -> Tensor:
    """A copy that is a leaf of its own, on `device` if given."""
    copy = x.detach().clone() if device is None else x.detach().to(device, copy=True)
    return copy.requires_grad_(x.requires_grad)


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """The parameters of a module as detached leaves, each once, in `parameters()`'s order.

    Args:
        module: whose parameters.
        device: where they shall be; where they are, if None.
        safe_copy: copy the values; False lets them share memory with the module's (where the
            device is the same).

    Returns:
        The tensors, which require gradients where the parameters do.

    Example:
        >>> import torch
        >>> from metarun.higher.utils import get_func_params
        >>> [tuple(p.shape) for p in get_func_params(torch.nn.Linear(3, 2))]
        [(2, 3), (2,)]
    """
    if safe_copy:
        return [copy_tensor(p, device) for p in module.parameters()]
    return [
        (p.detach() if device is None else p.detach().to(device)).requires_grad_(p.requires_grad)
        for p in module.parameters()
    ]
