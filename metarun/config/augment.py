"""The settings of augmentation: random changes of the pictures that are trained on."""

from typing import Literal

from metarun.config.checks import at_least, between, positive
from metarun.config.component import section
from metarun.errors import ConfigError, did_you_mean

Half = Literal["support", "query"]
Colour = Literal["brightness", "contrast", "saturation", "hue"]

TRANSFORMS = (
    "crop",
    "flip",
    "vertical_flip",
    "rotation",
    "translate",
    "scale",
    "shear",
    "brightness",
    "contrast",
    "saturation",
    "hue",
)
COLOURS: tuple[Colour, ...] = ("brightness", "contrast", "saturation", "hue")
OF_COLOUR = ("saturation", "hue")  # what grey pictures do not have
FILLED = ("crop", "rotation", "translate", "scale", "shear")  # something comes in from outside


@section("augment.")
class AugmentConfig:
    """Random changes of the pictures of training tasks, of each its own; null: none."""

    crop: int | None = None  # pixels of border, out of which the old size is cut at random
    flip: float | None = None  # probability that left and right change places
    vertical_flip: float | None = None  # probability that top and bottom change places
    rotation: float | None = None  # degrees: turned by up to so many, either way
    translate: float | None = None  # part of the side: moved by up to so much, each way
    scale: list[float] | None = None  # the size changes by a factor from … to …, as [0.8,1.2]
    shear: float | None = None  # degrees: slanted by up to so many, either way
    brightness: float | None = None  # 0.4: by a factor from 0.6 to 1.4
    contrast: float | None = None  # 0.4: by a factor from 0.6 to 1.4
    saturation: float | None = None  # 0.4: by a factor from 0.6 to 1.4
    hue: float | None = None  # part of the circle of colours, up to 0.5: either way
    fill: float | None = None  # what comes in from outside: 0 is black, 1 is white; null: 0
    support: list[str] | None = None  # which of these the support gets, as [crop,flip]; null: all
    query: list[str] | None = None  # which of these the queries get; null: all

    def __post_init__(self) -> None:
        limits = {"crop": 4096, "flip": 1, "vertical_flip": 1, "rotation": 180, "translate": 1}
        for name, most in (limits | {"shear": 80, "hue": 0.5, "fill": 1}).items():
            if (value := getattr(self, name)) is not None:
                between(f"augment.{name}", value, 0, most)
        for name in ("brightness", "contrast", "saturation"):
            if (value := getattr(self, name)) is not None:
                at_least(f"augment.{name}", value, 0)
        if self.scale is not None:
            if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
                raise ConfigError(f"augment.scale={self.scale}: expected e.g. [0.8,1.2]")
            for factor in self.scale:
                positive("augment.scale", factor)
        for half in ("support", "query"):
            self._check_names(half)
        if self.on and not self.of("support") and not self.of("query"):
            raise ConfigError(
                f"augment.support={self.support} augment.query={self.query}: nothing is left to "
                "change; leave augment out"
            )

    def _check_names(self, half: str) -> None:
        for name in getattr(self, half) or ():
            if name not in TRANSFORMS:
                hint = did_you_mean(name, TRANSFORMS)
                raise ConfigError(
                    f"augment.{half}: there is no {name!r}{hint}; choose from "
                    f"{', '.join(TRANSFORMS)}"
                )
            if getattr(self, name) is None:
                raise ConfigError(f"augment.{half} names {name}: give augment.{name}, too")

    @property
    def on(self) -> tuple[str, ...]:
        """The transforms that change something, in the order of `TRANSFORMS`."""
        return tuple(n for n in TRANSFORMS if getattr(self, n) not in (None, 0, [1, 1]))

    def of(self, half: Half | None) -> tuple[str, ...]:
        """Those of support pictures or of queries; None: of plain batches, which have no halves."""
        chosen = None if half is None else getattr(self, half)
        return tuple(name for name in self.on if chosen is None or name in chosen)
