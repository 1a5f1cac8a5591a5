"""Normalisations written out in operations whose derivatives are right at every order.

Each has the arguments of the function of `torch.nn.functional` of its name, and its value up to
rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    """`torch.layer_norm`."""
    dims = list(range(-len(tuple(normalized_shape)), 0))
    return _affine(_standardised(input, dims, eps), weight, bias)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    """`torch.group_norm` of (examples, channels, …)."""
    groups = input.reshape(input.shape[0], num_groups, -1)
    return _by_channel(_standardised(groups, [-1], eps).reshape(input.shape), weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` of (examples, channels, …)."""
    if not training:
        assert running_mean is not None and running_var is not None
        shape = [1, -1] + [1] * (input.dim() - 2)
        input = (input - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
        return _by_channel(input, weight, bias)
    if running_mean is not None:
        F.batch_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    dims = [0, *range(2, input.dim())]
    return _by_channel(_standardised(input, dims, eps), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm` of (examples, channels, …)."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _by_channel(_standardised(input, list(range(2, input.dim())), eps), weight, bias)


def rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.rms_norm`."""
    dims = list(range(-len(tuple(normalized_shape)), 0))
    least = torch.finfo(input.dtype).eps if eps is None else eps
    input = input * (input.square().mean(dims, keepdim=True) + least).rsqrt()
    return input if weight is None else input * weight


def _standardised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    return _affine(x, *(p if p is None else p.view(shape) for p in (weight, bias)))
