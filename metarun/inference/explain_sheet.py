"""One task as a picture."""

import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metarun.errors import RunError
from metarun.inference.explain import UNKNOWN, Explained
from metarun.inference.sheet import fitting, font, picture_of, write_sheet
from metarun.inference.trained import Trained

SIDE = 48  # pixels of a picture
CELL = 64  # width of what an inner step says
GAP = 6
LINE = 18
MOST_QUERIES = 3  # of a class that are drawn; of unknown class, so many for each class
MOST_SHOTS = 10  # of a class that are drawn
MOST_STEPS = 8  # inner steps that are drawn, the first and the last among them
RIGHT, WRONG = (46, 125, 50), (198, 40, 40)  # at a probability of 1; white at 0
OPEN = (21, 101, 192)  # the same, where nobody knows what is right


def steps_to_draw(steps: int) -> list[int]:
    """Of 0 … steps, `MOST_STEPS` at most, nearly evenly spread."""
    return sorted(
        {round(float(step)) for step in np.linspace(0, steps, min(steps + 1, MOST_STEPS))}
    )


def letter(label: int) -> str:
    """What a class is called in the picture: A, B, …, Z, 27, 28, …; ? is unknown."""
    if label == UNKNOWN:
        return "?"
    return string.ascii_uppercase[label] if label < 26 else str(label + 1)


def sheet_of(found: Explained, trained: Trained) -> Image.Image:
    """The picture of a task.

    On the left are the examples of each class. Beside them is a row for each query: its class, and
    for each inner step the predicted class with its probability, green where it is right, red
    where it is wrong and blue where the class is unknown. The last rows have the loss and the
    accuracy of all queries of the task whose class is known, and the names of the classes.
    """
    task, way = found.task, found.probabilities.shape[2]
    steps = steps_to_draw(len(found.losses) - 1)
    labels = [label for label in range(way) if (task.support_y == label).any()]
    starts, rows = _rows(task.query_y, way)
    shots = max(len(_places(task.support_y, label, MOST_SHOTS)) for label in labels)
    middle = 2 * GAP + LINE + shots * (SIDE + GAP) + 2 * GAP
    cells = middle + SIDE + GAP + LINE
    bottom = 2 * LINE + (max(starts[-1], *rows.values()) + 1) * (SIDE + GAP)
    figures = (("loss", found.losses), ("accuracy", found.scores)) if found.known.any() else ()
    heading = "queries, and predictions"
    if trained.algorithm.has_inner_loop:
        heading += " after inner steps:"
    right = max(cells + len(steps) * (CELL + GAP), middle + round(font().getlength(heading)))
    end = bottom + (len(figures) + len(found.legend)) * LINE + GAP
    sheet = Image.new("RGB", (right + GAP, end), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), "examples", fill="black", font=font())
    draw.text((middle, GAP), heading, fill="black", font=font())
    for label in labels:
        top = 2 * LINE + starts[label] * (SIDE + GAP)
        draw.text((GAP, top + SIDE // 3), letter(label), fill="black", font=font(14))
        for column, place in enumerate(_places(task.support_y, label, MOST_SHOTS)):
            left = 2 * GAP + LINE + column * (SIDE + GAP)
            sheet.paste(_picture(task.support_x[place], trained), (left, top))
    for column, step in enumerate(steps if trained.algorithm.has_inner_loop else ()):
        at = (cells + column * (CELL + GAP), LINE + 2)
        draw.text(at, str(step), fill="black", font=font())
    for place, row in rows.items():
        top, truth = 2 * LINE + row * (SIDE + GAP), int(task.query_y[place])
        sheet.paste(_picture(task.query_x[place], trained), (middle, top))
        at = (middle + SIDE + GAP, top + SIDE // 3)
        draw.text(at, letter(truth), fill="black", font=font(14))
        for column, step in enumerate(steps):
            left = cells + column * (CELL + GAP)
            _cell(draw, (left, top), found.probabilities[step, place], truth)
    for line, (name, values) in enumerate(figures):
        top = bottom + line * LINE
        draw.text((middle, top), name, fill="black", font=font())
        for column, step in enumerate(steps):
            value = float(values[step])
            text = f"{value:.3f}" if name == "loss" else f"{100 * value:.0f} %"
            draw.text((cells + column * (CELL + GAP), top), text, fill="black", font=font())
    for line, (label, name) in enumerate(found.legend.items(), len(figures)):
        text = fitting(draw, f"{letter(label)}  {name}", right - GAP)
        draw.text((GAP, bottom + line * LINE), text, fill="black", font=font())
    return sheet


def left_out(found: Explained) -> str | None:
    """How much of a task is drawn, for people to read; None: all of it."""
    task, way = found.task, found.probabilities.shape[2]
    shots = sum(len(_places(task.support_y, label, MOST_SHOTS)) for label in range(way))
    drawn = {
        "queries": (len(_rows(task.query_y, way)[1]), len(task.query_y), MOST_QUERIES),
        "examples": (shots, len(task.support_y), MOST_SHOTS),
    }
    told = [
        f"{some} of {all_} {what} ({most} of a class at most)"
        for what, (some, all_, most) in drawn.items()
        if some < all_
    ]
    return f"drawn: {', '.join(told)}" if told else None


def _rows(truth: Tensor, way: int) -> tuple[list[int], dict[int, int]]:
    """The row where each class begins, and those of the queries that are drawn, by their places.

    Each class has a row at least, for its examples. Queries of unknown class stand below the
    others.
    """
    starts, rows, row = [], dict[int, int](), 0
    for label in range(way):
        starts.append(row)
        places = _places(truth, label, MOST_QUERIES)
        rows |= {place: row + number for number, place in enumerate(places)}
        row += max(len(places), 1)
    first = row if rows else 0
    unknown = _places(truth, UNKNOWN, MOST_QUERIES * way)
    return starts, rows | {place: first + number for number, place in enumerate(unknown)}


def _places(labels: Tensor, label: int, most: int) -> list[int]:
    """The first examples of a class."""
    found: list[int] = (labels == label).nonzero()[:most, 0].tolist()
    return found


def _picture(x: Tensor, trained: Trained) -> Image.Image:
    pixels = (x.double() * 255).round().clamp(0, 255).to(torch.uint8)
    if trained.inputs is not None:
        pixels = torch.from_numpy(trained.inputs.as_seen(pixels.numpy()))
    return picture_of(pixels, SIDE)


def _cell(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], probabilities: Tensor, truth: int
) -> None:
    label = int(probabilities.argmax())
    sure = float(probabilities[label])
    full = OPEN if truth == UNKNOWN else RIGHT if label == truth else WRONG
    color = tuple(round(255 + sure * (part - 255)) for part in full)
    left, top = corner
    draw.rectangle((left, top, left + CELL, top + SIDE), fill=color)
    text = fitting(draw, f"{letter(label)}  {100 * sure:.0f} %", CELL - GAP)
    ink = "white" if sure > 0.6 else "black"
    draw.text((left + GAP, top + SIDE // 3), text, fill=ink, font=font())


def write(path: Path, found: Explained, trained: Trained) -> None:
    """Draw a task into a PNG file.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_sheet(path, sheet_of(found, trained))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose out=…") from error
