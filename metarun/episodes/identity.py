"""Which data a run has seen: the same text for the same content, in whatever folder it lies."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metarun.episodes.rng import stream_key, uniform
from metarun.episodes.source import EpisodeSource

SAMPLED = "episodes:"  # before an identity that is taken from a few episodes
DRAWN_BY = 1  # raise when the same data, seed and shape give other tasks
TOLERANCE = 1e-5  # of their numbers, in relation to their size: devices round differently


def identity_of(source: EpisodeSource) -> str:
    """What a source says of its content, or what the first of its episodes tell.

    A source has an attribute `identity`, a text that another content would not have: a digest of
    its files, or a name with a version. Where there is none, the first training and the first
    test episode are drawn. What they tell depends on the seed and on the shape of the tasks.
    """
    own = getattr(source, "identity", None)
    if isinstance(own, str):
        return own
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        drawn = [part for split in ("train", "test") for part in source.sample(split, 0, 1)]
    return SAMPLED + ",".join(map(_told, drawn))


def is_sampled(identity: str) -> bool:
    """Whether an identity was taken from episodes."""
    return identity.startswith(SAMPLED)


def same_data(one: str, other: str) -> bool:
    """Whether two identities are of the same content."""
    if not (is_sampled(one) and is_sampled(other)):
        return one == other
    ours, theirs = (_numbers(identity) for identity in (one, other))
    return len(ours) == len(theirs) and all(
        a[0] == b[0] and all(abs(x - y) <= TOLERANCE * a[1] for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def task_set(identity: str, split: str, seed: int, shape: Mapping[str, Any]) -> str | None:
    """A name for the tasks of a split: the same for the same tasks, in their order.

    A task is a function of the data, the seed, the split, its number and the shape of the tasks,
    so their digest stands for the tasks themselves. How many were taken is no part of it.

    Args:
        identity: of the data.
        split: whose tasks.
        seed: of the episodes.
        shape: way, shots, queries and whatever else says how a task is drawn.

    Returns:
        The name; None where the data have no identity but that of some episodes, which differs in
        its last digits from device to device.
    """
    if is_sampled(identity):
        return None
    text = json.dumps([DRAWN_BY, identity, split, seed, dict(shape)], sort_keys=True)
    return f"tasks:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def brief_identity(identity: str) -> str:
    """An identity as a message shows it: in so much of its text that others look different."""
    if len(identity) <= 24 or identity.startswith("sha256:"):
        return identity if len(identity) <= 24 else f"{identity[:23]}…"
    digest = hashlib.sha256(identity.encode(errors="replace")).hexdigest()
    return f"{identity[:14]}…{digest[:8]}"  # another may begin as it does


def _told(values: Tensor) -> str:
    """Number of elements, root of their mean square, and their product with fixed weights."""
    flat = values.detach().cpu().double().flatten().nan_to_num()
    weights = uniform(stream_key("identity"), torch.arange(len(flat))) - 0.5
    size = float(flat.square().mean().sqrt())
    return f"{len(flat)}/{size:.9g}/{float(flat @ weights) / max(len(flat), 1) ** 0.5:.9g}"


def _numbers(identity: str) -> list[Any]:
    try:
        parts = [part.split("/") for part in identity.removeprefix(SAMPLED).split(",")]
        return [(int(count), float(size), float(product)) for count, size, product in parts]
    except ValueError:  # of a checkpoint that somebody has changed
        return []
