"""One task as a picture: its support set and its queries, class by class."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

MARGIN = 2  # pixels between two examples
GAP = 12  # between support and queries
LEAST = 28  # pixels of an example's side: smaller ones are enlarged
MOST_QUERIES = 10  # of a class that are shown
LINE = 14  # pixels of a line of text


def contact_sheet(support: Tensor, query: Tensor, way: int) -> Image.Image:
    """A row for each class, with its support examples on the left and queries on the right.

    Args:
        support: (way * shot, channels, height, width), class by class, from 0 to 1; the channels
            are 1 or 3.
        query: (way * query, channels, height, width), likewise.
        way: classes.
    """
    channels, height, width = support.shape[1:]
    by_class = (way, -1, channels, height, width)
    rows = [(support.reshape(by_class), "support")]
    rows.append((query.reshape(by_class)[:, :MOST_QUERIES], "queries"))
    factor = -(-LEAST // min(height, width))
    step_x, step_y = width * factor + MARGIN, height * factor + MARGIN
    columns = sum(part.shape[1] for part, _ in rows)
    size = (columns * step_x + GAP + MARGIN, way * step_y + LINE + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(sheet), MARGIN
    for part, what in rows:
        draw.text((left, 1), what, fill="black")
        for row, examples in enumerate(part):
            for column, example in enumerate(examples):
                image = Image.fromarray(_as_rgb(example)).resize(
                    (width * factor, height * factor), Image.Resampling.NEAREST
                )
                sheet.paste(image, (left + column * step_x, LINE + MARGIN + row * step_y))
        left += part.shape[1] * step_x + GAP
    return sheet


def _as_rgb(example: Tensor) -> NDArray[np.uint8]:
    pixels = (example.cpu().double() * 255).round().clamp(0, 255).byte()
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
