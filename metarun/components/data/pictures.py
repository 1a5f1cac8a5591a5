"""What the data sets of picture files have in common: how a picture becomes pixels."""

from typing import Literal

from metarun.config.checks import between, positive
from metarun.config.component import settings
from metarun.errors import ConfigError
from metarun.pictures.decode import Preprocessing
from metarun.pictures.inputs import Inputs, reads

Resize = Literal["crop", "stretch", "pad"]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@settings
class PicturesConfig:
    """How pictures are read."""

    name: str = "???"
    size: int = 84  # pixels of each side
    resize: Resize = "crop"  # of a picture: its middle square, all of it, or all of it on white
    crop: float = 1.0  # resize=crop: part of the middle square's side that is kept
    filter: Filter = "bilinear"  # of Pillow, for the change of size
    color: Literal["rgb", "grey"] = "rgb"  # of the pixels
    skip_unreadable: bool = False  # leave out pictures that cannot be read, and name them

    def __post_init__(self) -> None:
        between("data.size", self.size, 1, 4096)
        positive("data.crop", self.crop)
        between("data.crop", self.crop, 0, 1)
        if self.crop < 1 and self.resize != "crop":
            raise ConfigError(f"data.crop={self.crop}: it goes with data.resize=crop")


def preprocessing(own: PicturesConfig) -> Preprocessing:
    """What the settings say is done to each picture."""
    return Preprocessing(own.size, own.resize, own.crop, own.filter, own.color)


@reads(PicturesConfig)
def inputs(own: PicturesConfig) -> Inputs:
    """What a network gets of a picture: the same as of those that were converted."""
    return Inputs(preprocessing(own))
