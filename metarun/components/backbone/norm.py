"""Batch normalisation that can be differentiated twice around vmap, and by other moments."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from metarun.unroll._torch import TransformType, retrieve_all_functorch_interpreters
from metarun.unroll.advice import UnsuitableModel

Fused = Literal["never", "evaluation", "but_large_twice", "always"]
"""When layers use torch's fused operation; see `BatchNorm`."""

LARGE = 2**23  # bytes of an input, of which torch's second derivative makes too many copies


class Moments(NamedTuple):
    """What a layer normalises by: the mean and the variance of each channel, and of how many."""

    mean: Tensor
    variance: Tensor
    examples: int | Tensor


class Seen:
    """The moments of each layer, in the order in which it was called.

    Attributes:
        of: them, by the layer's identity.
        always: the first of each are those of all calls.
    """

    def __init__(self, always: bool = False) -> None:
        self.of: dict[int, list[Moments]] = {}
        self.always = always

    def add(self, layer: nn.Module, moments: Moments) -> None:
        """Note what a call of a layer had."""
        self.of.setdefault(id(layer), []).append(moments)

    def with_those_of(self, other: "Seen") -> "Seen":
        """These and those of another block."""
        both = Seen()
        for key in [*self.of, *other.of]:
            both.of[key] = self.of.get(key, []) + other.of.get(key, [])
        return both


class _Here(threading.local):
    collects: Seen | None = None
    given: dict[int, Iterator[Moments]] | None = None
    known: Tensor | None = None


_here = _Here()


@contextmanager
def collecting() -> Iterator[Seen]:
    """What the layers normalise by in the block, in this thread."""
    before, _here.collects = _here.collects, Seen()
    try:
        yield _here.collects
    finally:
        _here.collects = before


@contextmanager
def using(seen: Seen) -> Iterator[None]:
    """Normalise by these moments in the block, in this thread, and not by those of the batch.

    Where nothing has been seen at all, each layer takes those of its batch.

    Raises:
        UnsuitableModel: inside the block, from a layer that is called more often than before.
    """
    every = {key: repeat(own[0]) if seen.always else iter(own) for key, own in seen.of.items()}
    before, _here.given = _here.given, every
    try:
        yield
    finally:
        _here.given = before


@contextmanager
def counting(known: Tensor | None) -> Iterator[None]:
    """Take the moments of a batch over some of its examples in the block, in this thread.

    Args:
        known: bool (examples,), which of them count; None: all.
    """
    before, _here.known = _here.known, known
    try:
        yield
    finally:
        _here.known = before


def counted() -> Tensor | None:
    """What `counting` was given, in this thread."""
    return _here.known


def _is_inner() -> bool:
    """Whether an inner gradient is being taken."""
    return bool(retrieve_all_functorch_interpreters())


def _beyond_second_order() -> bool:
    """Whether tasks are mapped, derivatives go forward, or more than one of torch.func is taken.

    One of them, an inner gradient, makes two with that of an outer loss.
    """
    levels = [level.key() for level in retrieve_all_functorch_interpreters()]
    return levels.count(TransformType.Grad) < len(levels) or len(levels) > 1


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of the batch at hand, no running ones.

    Within `using(seen)` it takes the moments that are given there, within `counting(known)` those
    of the examples that count.

    Attributes:
        averages: the moments that moving averages begin with, where pretrained weights came with
            some; None: mean 0 and variance 1.
        fused: when torch's fused operation is used, which is faster and right up to second
            derivatives where nothing is mapped: "never", in an "evaluation", "always", or always
            "but_large_twice": in training, inner losses of `LARGE` inputs are written out.

    Written out in elementary operations, and not `torch.nn.BatchNorm2d`, because second
    derivatives of torch's fused operation are wrong when autograd surrounds `torch.func.vmap`
    (its batching rule takes the saved mean and deviation for constants), and third ones are
    always: in float64, with torch
    2.15, the meta-gradient of small networks was 0.07 to 1.6 % off that of a loop, which agrees
    with finite differences. `meta_gradient` differentiates inside vmap, where both are right.
    Same parameters, same names, same outputs.
    """

    def __init__(self, channels: int, eps: float = 1e-5, gain: bool = True) -> None:
        """Build for a number of channels; without `gain` there is no weight."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if gain else None
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        self.averages: Moments | None = None
        self.fused: Fused = "never"

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, …) -> the same shape, in the same format."""
        if self._is_fused(x):
            # torch's second derivative needs a weight.
            gain = torch.ones_like(self.bias) if self.weight is None else self.weight
            out: Tensor = torch.native_batch_norm(
                x, gain, self.bias, None, None, True, 0.1, self.eps
            )[0]
            return out
        if x.dtype != self.bias.dtype:  # moments in bfloat16 would have two or three digits
            return self.normalised(x.to(self.bias.dtype)).to(x.dtype)
        return self.normalised(x)

    def _is_fused(self, x: Tensor) -> bool:
        if self.fused == "never" or (self.fused == "evaluation" and self.training):
            return False
        if self.fused == "but_large_twice" and self.training and x.nbytes > LARGE and _is_inner():
            return False
        special = _here.given is not None or _here.known is not None or _here.collects is not None
        return not special and not _beyond_second_order()

    def normalised(self, x: Tensor) -> Tensor:
        """The same, in the format of the parameters."""
        if _here.given:
            moments = next(_here.given.get(id(self), iter(())), None)
            if moments is None:
                raise UnsuitableModel(
                    "the backbone normalises queries more often, or in other layers, than the "
                    "support set, so there are no moments to do it by: choose "
                    "backbone.norm=transductive or support_plus_one"
                )
        elif _here.known is not None:
            moments = moments_of_known(x, _here.known)
        else:
            variance, mean = torch.var_mean(x, dim=(0, *range(2, x.dim())), correction=0)
            moments = Moments(mean, variance, x.numel() // x.shape[1])
        mean, variance, _ = moments
        if _here.collects is not None:
            _here.collects.add(self, moments)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = self.weight * scale
        shift = self.bias - mean * scale
        places = (-1, *[1] * (x.dim() - 2))
        return x * scale.view(places) + shift.view(places)


def moments_of_known(x: Tensor, known: Tensor) -> Moments:
    """The moments of each channel over some examples.

    Args:
        x: (examples, channels, …).
        known: bool (examples,), which of them count.

    Raises:
        UnsuitableModel: x has another number of examples.
    """
    if len(x) != len(known):
        raise UnsuitableModel(
            f"a BatchNorm of the backbone gets {len(x)} examples where there are {len(known)}, so "
            "it is not known which of them pad an uneven task: leave task.min_way, task.min_shot "
            "and task.imbalanced out"
        )
    dims = (0, *range(2, x.dim()))
    counted = known.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    number = counted.sum() * (x.numel() // (x.shape[0] * x.shape[1]))
    mean = (x * counted).sum(dims) / number
    apart = (x - mean.view(-1, *[1] * (x.dim() - 2))) * counted
    return Moments(mean, apart.square().sum(dims) / number, number)
