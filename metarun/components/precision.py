"""The number format that a network computes in, where it is not that of its weights.

`engine.precision=bf16` keeps all parameters, inner updates, losses, heads in closed form and
meta-gradients in float32. Only what the network itself computes is in bfloat16, by
`torch.autocast`, so its outputs have three significant digits.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.unroll.gradients.recompute import ALSO_RESTORED


class Precision(NamedTuple):
    """The formats of a run.

    Attributes:
        inner: of the network on a support set; None: that of the weights.
        outer: of the network on queries, and where there is no inner loop.
    """

    inner: torch.dtype | None = None
    outer: torch.dtype | None = None


class _Here(threading.local):
    dtype: torch.dtype | None = None


_here = _Here()


@contextmanager
def computing_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Let networks compute in a format in the block, in this thread; None: that of the weights."""
    before, _here.dtype = _here.dtype, dtype
    try:
        yield
    finally:
        _here.dtype = before


def _as_now() -> Callable[[], AbstractContextManager[None]]:
    return partial(computing_in, _here.dtype)


ALSO_RESTORED.append(_as_now)  # backward passes compute losses again, when a block is over


def computed_in_format(compute: Callable[[], Tensor], x: Tensor, like: torch.dtype) -> Tensor:
    """The outputs of a network, in the format of its weights.

    Args:
        compute: the call of the network.
        x: its input.
        like: the format of the weights.
    """
    if _here.dtype is None:
        return compute()
    # Without a cache of cast weights: it would outlive a recording, and miss derivatives by them.
    with torch.autocast(x.device.type, _here.dtype, cache_enabled=False):
        outputs = compute()
    return outputs.to(like)


def within(dtype: torch.dtype | None, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose networks compute in a format."""

    def inside(*args: Any) -> Any:
        with computing_in(dtype):
            return fn(*args)

    return inside
