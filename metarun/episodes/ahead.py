"""Drawing small meta-batches several at a time: what one costs is mostly calls, not work."""

from metarun.episodes.source import Episodes, EpisodeSource

LARGEST = 2**20  # bytes that are drawn at a time
MOST = 32  # meta-batches that are drawn at a time


class Ahead:
    """The episodes of a split, as its source draws them, for a reader that goes forwards.

    An episode depends on its index alone, so it does not matter with which others it is drawn.
    """

    def __init__(self, source: EpisodeSource, split: str) -> None:
        self._source, self._split = source, split
        self._start = 0
        self._drawn: Episodes | None = None
        self._batches = 1

    def sample(self, start: int, count: int) -> Episodes:
        """Episodes `start` … `start + count - 1`; a view of what was drawn."""
        first = start - self._start
        if self._drawn is None or not 0 <= first <= len(self._drawn.support_x) - count:
            self._drawn = self._source.sample(self._split, start, count * self._batches)
            self._start, first = start, 0
            size = sum(part.numel() * part.element_size() for part in self._drawn)
            self._batches = max(1, min(MOST, LARGEST * self._batches // max(size, 1)))
        if len(self._drawn.support_x) == count:
            return self._drawn
        parts = (part[first : first + count] for part in self._drawn)
        return type(self._drawn)(*parts)  # a plugin's episodes may have more fields
