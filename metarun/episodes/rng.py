"""Random numbers as a pure function of integers: no state, so nothing to save or to share.

Every number is the SplitMix64 finaliser (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators") of its coordinates, computed in torch's wrapping int64
arithmetic. CPU and GPU give the same bits, and so does every version of torch.
"""

import hashlib
import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def stream_key(*parts: object) -> int:
    """A 64-bit key for a named stream of numbers, such as ("episodes", seed, "train")."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def random_bits(key: int | Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each counter.

    Args:
        key: the stream, an int64 or an int64 tensor that broadcasts against `counters`.
        counters: int64, any shape.

    Returns:
        int64 tensor of the broadcast shape, uniform over all 64-bit patterns.
    """
    z = key + (counters + 1) * _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _shift_right(z, 31)


def uniform(key: int | Tensor, counters: Tensor) -> Tensor:
    """Float64 numbers in [0, 1) with 53 random bits, one a counter."""
    return _shift_right(random_bits(key, counters), 11).double() * 2.0**-53


def normal(key: int | Tensor, counters: Tensor) -> Tensor:
    """Standard normal float64 numbers, one for each pair of counters (Box and Muller 1958).

    Args:
        key: the stream, an int64 or an int64 tensor that broadcasts against `counters`.
        counters: int64 (…, 2 * numbers).

    Returns:
        float64 (…, numbers), of the broadcast shape.
    """
    numbers = uniform(key, counters)
    radius, angle = numbers[..., 0::2], numbers[..., 1::2]
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _shift_right(z: Tensor, by: int) -> Tensor:
    """Logical shift; torch's own shifts the sign in."""
    return (z >> by) & ((1 << (64 - by)) - 1)
