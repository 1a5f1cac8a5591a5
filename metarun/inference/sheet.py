"""Pictures with their labels, on one sheet."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metarun.errors import printable_name
from metarun.system.files import write_atomically

SIDE = 96  # pixels of a picture on the sheet
GAP = 6
LINE = 14  # pixels of a line of text
COLUMNS = 8
MOST = 200  # pictures on a sheet


@cache
def font(size: int = 11) -> ImageFont.FreeTypeFont:
    """The font of the plots: it has the letters of most alphabets."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), size)


def picture_of(pixels: Tensor, side: int = SIDE) -> Image.Image:
    """A picture of uint8 pixels (1 or 3 channels, height, width), enlarged or shrunk to `side`."""
    small = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    filter = Image.Resampling.NEAREST if small.width <= side else Image.Resampling.BOX
    return small.resize((side, side), filter)


def fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text in one line, cut where it would be wider than `width` pixels."""
    text = printable_name(text)
    if draw.textlength(text, font()) <= width:
        return text
    while text and draw.textlength(text + "…", font()) > width:
        text = text[:-1]
    return text + "…"


def sheet_of(pixels: Tensor, captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures in rows, each above the lines of its caption.

    Args:
        pixels: uint8 (pictures, channels, height, width), of `MOST` pictures or fewer.
        captions: lines of text for each.
    """
    lines = max(map(len, captions))
    columns = min(COLUMNS, len(captions))
    step = (SIDE + GAP, SIDE + GAP + lines * LINE)
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(place, columns)
        left, top = GAP + column * step[0], GAP + row * step[1]
        sheet.paste(picture_of(picture), (left, top))
        for number, text in enumerate(caption):
            at = (left, top + SIDE + number * LINE)
            draw.text(at, fitting(draw, text, SIDE), fill="black", font=font())
    return sheet


def write_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a sheet as a PNG file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, lambda file: sheet.save(file, format="PNG"))
