"""What the network of a run gets of a picture: stated once per data set, for training and later.

The file of a data set marks by `reads` what it does to pictures. Pictures that a trained run is
asked about are then treated in the same way, and the data of the run need not be there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metarun.pictures.convert import read_pixels
from metarun.pictures.decode import Pixels, Preprocessing, to_pixels, upright
from metarun.pictures.listing import Picture

HOW = {
    "crop": "the middle square",
    "stretch": "stretched to a square",
    "pad": "the whole picture on a white square",
}
"""What a message says of `Preprocessing.resize`."""


class Inputs(NamedTuple):
    """From a picture to what a network gets of it.

    Attributes:
        how: size, channels and what is done about a picture that is not square.
        inverted: whether ink becomes 255 and white paper 0.
    """

    how: Preprocessing
    inverted: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.how.shape

    def of_file(self, picture: Picture) -> Pixels:
        """The pixels of a picture in a file, uint8 of `shape`.

        Raises:
            UnreadableError: it is not there, or no picture.
        """
        return self._turned(read_pixels(picture, self.how))

    def of_image(self, image: Image.Image) -> Pixels:
        """The pixels of an opened picture, uint8 of `shape`.

        Raises:
            UnreadableError: its numbers have 32 bits.
        """
        return self._turned(to_pixels(upright(image), self.how))

    def as_seen(self, pixels: Pixels) -> Pixels:
        """The pixels with ink as dark as it is on paper."""
        return self._turned(pixels)

    def _turned(self, pixels: Pixels) -> Pixels:
        return np.subtract(255, pixels) if self.inverted else pixels

    def __str__(self) -> str:
        how = self.how
        part = f" (its inner {how.crop:g})" if how.resize == "crop" and how.crop < 1 else ""
        ink = ", ink inverted: white paper is 0, black ink 255" if self.inverted else ""
        return f"{how.size}×{how.size}, {how.color}, {HOW[how.resize]}{part}, {how.filter}{ink}"


_readers: dict[type, Callable[[Any], Inputs]] = {}
"""Settings of a data set -> what its networks get of a picture."""


def reads(schema: type) -> Callable[[Callable[[Any], Inputs]], Callable[[Any], Inputs]]:
    """Mark the function of a data set's file that says what a network gets of a picture.

    It takes the settings. It counts for settings that inherit from these as well.

    Example:
        >>> from metarun.config.component import settings
        >>> from metarun.pictures.inputs import Inputs, Preprocessing, inputs_of, reads
        >>> @settings
        ... class MineConfig:
        ...     size: int = 32
        >>> @reads(MineConfig)
        ... def inputs(own: MineConfig) -> Inputs:
        ...     return Inputs(Preprocessing(size=own.size))
        >>> inputs_of(MineConfig()).shape
        (3, 32, 32)
    """

    def decorate(function: Callable[[Any], Inputs]) -> Callable[[Any], Inputs]:
        _readers[schema] = function
        return function

    return decorate


def inputs_of(own: Any) -> Inputs | None:
    """What a network gets of a picture; None where the data are no pictures, or do not say.

    Args:
        own: settings of a data set whose file is imported by now.
    """
    for kind in type(own).__mro__:
        if kind in _readers:
            return _readers[kind](own)
    return None
