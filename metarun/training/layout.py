"""Tensors with their channels last in memory, which convolutions on a CPU prefer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metarun.unroll._torch import pytree


def channels_last(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of arguments whose images and convolution weights are laid out with channels last.

    What a convolution gives then has that layout too, as have normalisation, ReLU and gradients
    behind it.

    Args:
        fn: a function of pytrees of tensors.
    """

    def laid_out(*args: Any) -> Any:
        return fn(*pytree.tree_map(_channels_last, args))

    return laid_out


def _channels_last(value: Tensor) -> Tensor:
    if value.dim() != 4:
        return value
    # Not `value.contiguous(memory_format=...)`: that leaves the strides of a single channel as
    # they are, from which convolutions tell the layout.
    return (
        value.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    )
