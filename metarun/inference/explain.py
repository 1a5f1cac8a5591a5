"""One task as a picture: the examples, the queries, and what each inner step makes of them."""

import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metarun.episodes.source import Episodes
from metarun.errors import ConfigError, RunError
from metarun.inference.sheet import fitting, font, picture_of, write_sheet
from metarun.inference.trained import Trained

SIDE = 48  # pixels of a picture
CELL = 64  # width of what an inner step says
GAP = 6
LINE = 18
MOST_QUERIES = 3  # of a class that are drawn
MOST_SHOTS = 10  # of a class that are drawn
MOST_STEPS = 8  # inner steps that are drawn, the first and the last among them
RIGHT, WRONG = (46, 125, 50), (198, 40, 40)  # at a probability of 1; white at 0


class Explained(NamedTuple):
    """A task and what a run makes of it.

    Attributes:
        task: its tensors, without a first dimension.
        probabilities: float64 (inner steps + 1, queries, way), from before the first step.
        losses: float64 (inner steps + 1,), of the queries.
        scores: the fraction of queries that is right, likewise.
    """

    task: Episodes
    probabilities: Tensor
    losses: Tensor
    scores: Tensor


def explain(trained: Trained, split: str, episode: int) -> Explained:
    """Adapt to a task, and look at the queries before and after each inner step.

    Args:
        trained: the run, with its data.
        split: whose tasks.
        episode: the number of the task.

    Raises:
        ConfigError: the tasks are no classification of pictures, or the algorithm does not say
            what its outputs are.
    """
    setup = trained.setup
    shape, name = setup.source.input_shape, trained.config.data.name
    if setup.source.kind != "classification" or len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"explain draws tasks of pictures, which data={name} does not have")
    if setup.algorithm.outputs is None:
        raise ConfigError(
            f"algo={trained.config.algo.name} does not say what it predicts for each query: it is "
            "made neither by at_once nor by by_steps"
        )
    task = Episodes(*(part[0] for part in setup.source.sample(split, episode, 1)))
    with torch.no_grad():
        outputs = setup.algorithm.outputs(trained.meta, task)
        found = [setup.objective.loss(one, task.query_y) for one in outputs]
        scores = [setup.objective.score(one, task.query_y) for one in outputs]
    return Explained(
        Episodes(*(part.cpu() for part in task)),
        outputs.double().softmax(-1).cpu(),
        torch.stack(found).double().cpu(),
        torch.stack(scores).double().cpu(),
    )


def steps_to_draw(steps: int) -> list[int]:
    """Of 0 … steps, `MOST_STEPS` at most, nearly evenly spread."""
    return sorted(
        {round(float(step)) for step in np.linspace(0, steps, min(steps + 1, MOST_STEPS))}
    )


def letter(label: int) -> str:
    """What a class is called in the picture: A, B, …, Z, 27, 28, …"""
    return string.ascii_uppercase[label] if label < 26 else str(label + 1)


def sheet_of(found: Explained, trained: Trained) -> Image.Image:
    """The picture of a task.

    On the left are the examples of each class. Beside them is a row for each query: its class, and
    for each inner step the predicted class with its probability, green where it is right. The
    last rows have the loss and the accuracy of all queries of the task.
    """
    task, way = found.task, found.probabilities.shape[2]
    steps = steps_to_draw(len(found.losses) - 1)
    labels = [label for label in range(way) if (task.support_y == label).any()]
    asked = {label: _places(task.query_y, label, MOST_QUERIES) for label in labels}
    rows = [place for label in labels for place in asked[label]]
    shots = max(len(_places(task.support_y, label, MOST_SHOTS)) for label in labels)
    middle = 2 * GAP + LINE + shots * (SIDE + GAP) + 2 * GAP
    cells = middle + SIDE + GAP + LINE
    bottom = 2 * LINE + len(rows) * (SIDE + GAP)
    heading = "queries, and predictions"
    if trained.algorithm.has_inner_loop:
        heading += " after inner steps:"
    right = max(cells + len(steps) * (CELL + GAP), middle + round(font().getlength(heading)))
    sheet = Image.new("RGB", (right + GAP, bottom + 2 * LINE + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), "examples", fill="black", font=font())
    draw.text((middle, GAP), heading, fill="black", font=font())
    for label in labels:
        top = 2 * LINE + sum(len(asked[before]) for before in range(label)) * (SIDE + GAP)
        draw.text((GAP, top + SIDE // 3), letter(label), fill="black", font=font(14))
        for column, place in enumerate(_places(task.support_y, label, MOST_SHOTS)):
            left = 2 * GAP + LINE + column * (SIDE + GAP)
            sheet.paste(_picture(task.support_x[place], trained), (left, top))
    for column, step in enumerate(steps if trained.algorithm.has_inner_loop else ()):
        at = (cells + column * (CELL + GAP), LINE + 2)
        draw.text(at, str(step), fill="black", font=font())
    for row, place in enumerate(rows):
        top, truth = 2 * LINE + row * (SIDE + GAP), int(task.query_y[place])
        sheet.paste(_picture(task.query_x[place], trained), (middle, top))
        at = (middle + SIDE + GAP, top + SIDE // 3)
        draw.text(at, letter(truth), fill="black", font=font(14))
        for column, step in enumerate(steps):
            left = cells + column * (CELL + GAP)
            _cell(draw, (left, top), found.probabilities[step, place], truth)
    for line, (name, values) in enumerate((("loss", found.losses), ("accuracy", found.scores))):
        top = bottom + line * LINE
        draw.text((middle, top), name, fill="black", font=font())
        for column, step in enumerate(steps):
            value = float(values[step])
            text = f"{value:.3f}" if name == "loss" else f"{100 * value:.0f} %"
            draw.text((cells + column * (CELL + GAP), top), text, fill="black", font=font())
    return sheet


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
    full = RIGHT if label == truth else WRONG
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
