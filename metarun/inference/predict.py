"""Labels for pictures, by a trained run and a few examples of each class."""

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from metarun.components.algo.adapting import Predictor
from metarun.errors import ConfigError, DataError, RunError
from metarun.inference.sheet import sheet_of, write_sheet
from metarun.inference.support import Labelled, read_pictures
from metarun.inference.trained import Trained
from metarun.pictures.inputs import Inputs
from metarun.pictures.listing import Picture
from metarun.system.files import write_atomically

log = logging.getLogger(__name__)

FIRST_COLUMNS = ("path", "label", "probability")


@dataclass(frozen=True)
class Predictions:
    """What the pictures were taken for.

    Attributes:
        paths: the pictures that could be read.
        class_names: the classes.
        probabilities: float64 (pictures, classes).
        pixels: uint8 (shown pictures, channels, height, width), of the first of them, as seen.
    """

    paths: list[str]
    class_names: tuple[str, ...]
    probabilities: Tensor
    pixels: Tensor

    @property
    def labels(self) -> list[str]:
        """The most probable class of each picture."""
        return [self.class_names[place] for place in self.probabilities.argmax(1).tolist()]


def inputs_of_run(trained: Trained) -> Inputs:
    """What is done to pictures.

    Raises:
        ConfigError: the run has not learned from pictures.
    """
    if trained.inputs is None:
        kind = trained.setup.source.kind
        tasks = ", a regression" if kind == "regression" else ""
        raise ConfigError(
            f"the run has learned from data={trained.config.data.name}{tasks}, which does not say "
            "what it does to pictures: labelling pictures needs a run on pictures, such as "
            "data=folder or data=omniglot"
        )
    return trained.inputs


def adapted(trained: Trained, support: Labelled) -> Predictor:
    """The predictor for the classes of a support set."""
    x = trained.to_inputs(support.pixels)
    return trained.adapt(x, support.labels.to(x.device), len(support.class_names))


def conditions(trained: Trained, support: Labelled) -> list[str]:
    """What was done under which conditions, for people to read."""
    config = trained.config
    counts = ", ".join(f"{name} {count}" for name, count in support.counts.items())
    lines = [
        f"{trained.path}, after meta-step {trained.step}: {config.algo.name} on {config.data.name}",
        f"pictures, as in training: {inputs_of_run(trained)}",
        f"support: {len(support.labels)} pictures of {len(support.class_names)} classes ({counts})",
        f"batch norm: {trained.setup.batch_norm}",
    ]
    if (why := trained.predict_together) is not None:
        lines.append(f"a label depends on the other pictures of its batch: {why}")
    return lines


def batches_of(count: int, size: int) -> list[range]:
    """Places of pictures in as few batches as sizes up to `size` allow.

    Each batch has pictures from everywhere in the list: where they are normalised together,
    a batch of one class alone would be unlike any that the run has seen.
    """
    number = -(-count // size)
    return [range(first, count, number) for first in range(number)]


def usual_batch(trained: Trained) -> int:
    """As many pictures as an evaluation of the run takes together: the queries of a task."""
    return trained.config.task.way * trained.config.task.query


def probabilities_of(scores: Tensor) -> Tensor:
    """The softmax of scores (pictures, classes), float64 on the CPU.

    Raises:
        RunError: they are no numbers.
    """
    scores = scores.double().cpu()
    # A class may have probability 0, whose logarithm is −∞.
    if (scores.isnan() | (scores == torch.inf)).any() or scores.amax(1).isinf().any():
        raise RunError(
            "the adapted network gives scores that are no finite numbers: a lower "
            "algo.eval_inner_steps may help, or more examples of each class"
        )
    return scores.softmax(1)


def label_pictures(
    trained: Trained,
    support: Labelled,
    paths: Sequence[str],
    *,
    batch: int | None = None,
    skip_unreadable: bool = False,
    shown: int = 0,
) -> Predictions:
    """Adapt to the support set, then label pictures.

    Args:
        trained: the run.
        support: pictures of each class.
        paths: files of the pictures to be labelled.
        batch: how many are labelled together; None: as many as in an evaluation of the run.
        skip_unreadable: leave out pictures that cannot be read.
        shown: of how many, the first ones, the pixels are kept.

    Raises:
        ConfigError: the run's network cannot tell so many classes apart.
        DataError: a picture cannot be read, or none can.
        RunError: the scores are no finite numbers.
    """
    inputs, predict = inputs_of_run(trained), adapted(trained, support)
    kept: dict[int, Tensor] = {}
    pixels: dict[int, Tensor] = {}
    for places, own in _read(paths, inputs, batch or usual_batch(trained), skip_unreadable):
        if not places:
            continue
        found = probabilities_of(predict(trained.to_inputs(own)))
        kept |= dict(zip(places, found, strict=True))
        pixels |= {place: one for place, one in zip(places, own, strict=True) if place < shown}
    if not kept:
        raise DataError(f"none of {len(paths)} pictures can be read")
    seen = [torch.from_numpy(inputs.as_seen(pixels[place].numpy())) for place in sorted(pixels)]
    return Predictions(
        [paths[place] for place in sorted(kept)],
        support.class_names,
        torch.stack([kept[place] for place in sorted(kept)]),
        torch.stack(seen) if seen else torch.empty(0, *inputs.shape, dtype=torch.uint8),
    )


def _read(
    paths: Sequence[str], inputs: Inputs, size: int, skip_unreadable: bool
) -> Iterator[tuple[list[int], Tensor]]:
    with tqdm(total=len(paths), desc="labelling", unit="picture", disable=None) as bar:
        for chosen in batches_of(len(paths), size):
            pictures = [Picture(paths[place]) for place in chosen]
            pixels, there = read_pictures(pictures, inputs, skip_unreadable)
            yield [chosen[place] for place in there], pixels
            bar.update(len(chosen))


def to_csv(predictions: Predictions) -> str:
    """A line for each picture: its path, its label, its probability, and that of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *predictions.class_names])
    rows = zip(predictions.paths, predictions.labels, predictions.probabilities, strict=True)
    for path, label, row in rows:
        writer.writerow([path, label, repr(float(row.max())), *map(repr, row.tolist())])
    return text.getvalue()


def refuse_foreign(path: Path) -> None:
    """Refuse to overwrite a file that is no table of predictions.

    Raises:
        ConfigError: there is one.
    """
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder: name a file, e.g. out=predictions.csv")
    if path.exists():
        with open(path, "rb") as file:
            if not file.read(100).startswith(",".join(FIRST_COLUMNS).encode()):
                raise ConfigError(f"{path} is no table of predictions: choose another out=")


def write_csv(path: Path, predictions: Predictions) -> None:
    """Write the table.

    Raises:
        RunError: it cannot be written.
    """
    try:
        # Names of files need not be text: such bytes are written as they are.
        content = to_csv(predictions).encode(errors="surrogateescape")
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose out=…") from error


def write_sheet_of(path: Path, predictions: Predictions) -> None:
    """Draw the first pictures with their labels.

    Raises:
        RunError: it cannot be written.
    """
    best = predictions.probabilities.amax(1).tolist()
    captions = [
        [label, f"{100 * probability:.0f} %  {Path(name).name}"]
        for label, probability, name in zip(
            predictions.labels, best, predictions.paths, strict=True
        )
    ][: len(predictions.pixels)]
    if (left := len(predictions.paths) - len(captions)) > 0:
        log.info("%s shows the first %d pictures, and %d others not", path, len(captions), left)
    try:
        write_sheet(path, sheet_of(predictions.pixels, captions))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose sheet=…") from error
