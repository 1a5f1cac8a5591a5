"""Episodes of several sources: each is of one of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metarun.episodes.identity import identity_of, is_sampled
from metarun.episodes.rng import stream_key, uniform
from metarun.episodes.source import Episodes, EpisodeSource, splits_of


class SeveralSources:
    """Training episodes of one source each, drawn by weight; others of each source in turn.

    Training episode `i` is episode `i` of a source that `(seed, i)` alone decides. With S sources,
    validation and test episode `i` is episode `i // S` of source `i % S`.

    Args:
        sources: by name, in the order of their turns. All have the same kind, shape of examples
            and number of outputs.
        weights: of each source; a training episode is of it with this part of their sum.
        seed: decides which source a training episode is of.

    Attributes:
        names: of the sources, in the order of their turns.
        identity: a digest of theirs; None if one of them has none of its own.
    """

    def __init__(
        self, sources: Mapping[str, EpisodeSource], weights: Sequence[float], seed: int
    ) -> None:
        """Take the sources.

        Raises:
            ValueError: a source has another kind or shape than the first, or lacks a split.
        """
        self.sources, self.names = dict(sources), tuple(sources)
        self._seed = seed
        shares = torch.tensor(list(weights), dtype=torch.float64)
        self._bounds = (shares.cumsum(0) / shares.sum())[:-1]
        first = self.sources[self.names[0]]
        self.kind, self.outputs = first.kind, first.outputs
        self.input_shape = tuple(first.input_shape)
        self.within = getattr(first, "within", "all")
        self.uneven = getattr(first, "uneven", None)
        for name, source in self.sources.items():
            _check_alike(self.names[0], first, name, source)
        told = [identity_of(source) for source in self.sources.values()]
        digest = hashlib.sha256(repr(told).encode()).hexdigest()
        self.identity = None if any(map(is_sampled, told)) else f"sha256:{digest}"

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Episodes `start` … `start + count - 1` of a split."""
        if split == "train":
            chosen = self.chosen(start, count)
            # Each source draws them all: an episode is drawn by its number, and calls cost more.
            drawn = [
                source.sample(split, start, count) if bool((chosen == place).any()) else None
                for place, source in enumerate(self.sources.values())
            ]
            places = torch.arange(count)
        else:
            turns = len(self.names)
            numbers = torch.arange(start, start + count)
            chosen, own = numbers % turns, numbers // turns
            least = [
                int(own[chosen == k].min()) if (chosen == k).any() else 0 for k in range(turns)
            ]
            drawn = [
                source.sample(split, least[place], int((chosen == place).sum()))
                if bool((chosen == place).any())
                else None
                for place, source in enumerate(self.sources.values())
            ]
            places = own - torch.tensor(least)[chosen]
        return _put_together(drawn, chosen, places)

    def chosen(self, start: int, count: int) -> Tensor:
        """The numbers of the sources of training episodes `start` … `start + count - 1`."""
        key = stream_key("sources", self._seed, "train")
        drawn = uniform(key, torch.arange(start, start + count))
        return torch.bucketize(drawn, self._bounds, right=True)

    def fitted(self, shape: tuple[int, ...], invert: bool = False) -> "SeveralSources":
        """The same episodes, with images as `metarun.episodes.fitting.fitted` makes them.

        Raises:
            ValueError: as there, or a source has no images.
        """
        change: Callable[..., EpisodeSource] | None
        fitted = {}
        for name, source in self.sources.items():
            if (change := getattr(source, "fitted", None)) is None:
                raise ValueError(f"{name} has no images that could be changed")
            fitted[name] = change(shape, invert)
        other = SeveralSources(fitted, [1.0] * len(fitted), self._seed)
        other._bounds = self._bounds
        return other


def _check_alike(one: str, first: EpisodeSource, name: str, source: EpisodeSource) -> None:
    if lacking := [split for split in ("train", "val", "test") if split not in splits_of(source)]:
        raise ValueError(f"{name} has no {lacking[0]} split")
    if source.kind != first.kind:
        raise ValueError(f"the tasks of {one} are {first.kind}, those of {name} {source.kind}")
    if tuple(source.input_shape) != tuple(first.input_shape) or source.outputs != first.outputs:
        shown = ["×".join(map(str, each.input_shape)) for each in (first, source)]
        raise ValueError(
            f"the examples of {one} are {shown[0]}, those of {name} {shown[1]} (images: channels × "
            "height × width)"
        )


def _put_together(drawn: Sequence[Episodes | None], chosen: Tensor, places: Tensor) -> Episodes:
    """The episode at `places[i]` of what source `chosen[i]` has drawn, for each i.

    By Python's numbers: an accelerator would be waited for while tensors of them are copied to it.
    """
    own = {source: episodes for source, episodes in enumerate(drawn) if episodes is not None}
    rows = list(zip(chosen.tolist(), places.tolist(), strict=True))
    fields = range(len(Episodes._fields))
    return Episodes(*(torch.stack([own[source][i][at] for source, at in rows]) for i in fields))
