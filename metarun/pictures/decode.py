"""One picture, of any format and mode that Pillow reads, as the pixels that a network gets.

What is done to a picture is stated by a `Preprocessing`, and is the same for pictures that are
converted in advance and for those that are labelled later.
"""

import io
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]

MOST_BYTES = 2**29  # of the file of a picture
MOST_PIXELS = 89_478_485  # what Pillow warns of: a small file may say that it has many more
_TOO_LARGE = f"it has more than {MOST_PIXELS:,} pixels"
FINE = 3  # pixels of a decoded JPEG for each one that is left
NOT_READ = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
"""EPS is a program, which another program would run; of the others Pillow knows the name only."""

DEEP = frozenset({"PNG", "PPM"})
"""Formats whose numbers of 16 bits Pillow gives in 32."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class UnreadableError(ValueError):
    """A picture cannot be read; says why, and not which."""


class Preprocessing(NamedTuple):
    """What is done to every picture.

    Attributes:
        size: pixels of each side.
        resize: how a picture becomes square. "crop" takes a centred square of the height or the
            width, whichever is less; "stretch" changes the aspect ratio; "pad" puts the whole
            picture into the middle of a white square.
        crop: the part of that square's side that "crop" keeps, above 0 and up to 1.
        filter: one of `FILTERS`. All but "nearest" take the mean of what becomes one pixel.
        color: "rgb" or "grey".
    """

    size: int = 84
    resize: str = "crop"
    crop: float = 1.0
    filter: str = "bilinear"
    color: str = "rgb"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        return (1 if self.color == "grey" else 3, self.size, self.size)


def decode(content: bytes, how: Preprocessing) -> Pixels:
    """The pixels of a picture from the content of its file.

    Returns:
        uint8, `how.shape`.

    Raises:
        UnreadableError: the content is empty, truncated, too large or no picture.
    """
    return to_pixels(open_picture(content, round(FINE * how.size / how.crop)), how)


def open_picture(content: bytes, enough: int | None = None) -> Image.Image:
    """A picture in mode RGB or L, upright as its EXIF data say, on white where it is transparent.

    Of several frames or pages it is the first one. Colour profiles are ignored.

    Args:
        content: of its file.
        enough: pixels of a side. A JPEG whose sides are twice, four or eight times as long, or
            longer, is decoded at that part of its size: so a photograph of 12 million pixels
            takes a few milliseconds. None: all are decoded as they are.

    Raises:
        UnreadableError: as `decode`.
    """
    if not content:
        raise UnreadableError("it is empty")
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UnreadableError(_TOO_LARGE)
            if enough is not None:
                image.draft(None, (enough, enough))
            image.load()
            return upright(image)
    except (UnreadableError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("it is no picture of a format that Pillow knows") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableError(_TOO_LARGE) from error
    except Exception as error:  # damage has many types in Pillow
        raise UnreadableError(f"it is damaged ({_reason(error)})") from error


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture as `open_picture` gives it.

    Raises:
        UnreadableError: its numbers have 32 bits.
    """
    is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in DEEP)
    return _in_eight_bits(ImageOps.exif_transpose(image), is_deep)


def to_pixels(image: Image.Image, how: Preprocessing) -> Pixels:
    """The pixels of an opened picture.

    Returns:
        uint8, `how.shape`.
    """
    mode = "L" if how.color == "grey" else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    side, kind = (how.size, how.size), FILTERS[how.filter]
    if how.resize == "stretch":
        image = image.resize(side, kind)
    elif how.resize == "pad":
        image = ImageOps.pad(image, side, kind, color="white")
    else:
        image = ImageOps.fit(image, side, kind, bleed=(1 - how.crop) / 2)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@cache
def extensions() -> frozenset[str]:
    """How the names of pictures end, in small letters: ".jpg", …"""
    known = Image.registered_extensions().items()
    return frozenset(extension for extension, name in known if name in _formats())


def _in_eight_bits(image: Image.Image, is_deep: bool) -> Image.Image:
    """RGB or L; 16 bits are scaled, transparency is white, other modes as Pillow converts them."""
    if is_deep:
        deep = np.asarray(image)
        scaled = np.rint(deep / 257).astype(np.uint8)
        if (clear := image.info.get("transparency")) is not None:
            scaled[deep == clear] = 255
        return Image.fromarray(scaled)
    if image.has_transparency_data:
        _transparency_in_eight_bits(image)
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableError("its numbers have 32 bits, of which none is white: save it with 16")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _transparency_in_eight_bits(image: Image.Image) -> None:
    """Of colours with 16 bits Pillow keeps the first eight, but not so of the transparent one."""
    color = image.info.get("transparency")
    if isinstance(color, tuple) and max(color) > 255:
        image.info["transparency"] = tuple(part >> 8 for part in color)


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
