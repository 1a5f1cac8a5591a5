"""Labels for pictures, by a trained run and a few examples of each class."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metarun.components.algo.adapting import Predictor
from metarun.errors import ConfigError, DataError, printable_name
from metarun.inference.calibrated import too_few
from metarun.inference.judgement import Judgement, labels_in
from metarun.inference.outcomes import checked
from metarun.inference.support import Labelled, read_pictures
from metarun.inference.trained import Trained
from metarun.pictures.inputs import Inputs
from metarun.pictures.listing import Picture


@dataclass(frozen=True)
class Predictions:
    """What the pictures were taken for.

    Attributes:
        paths: the pictures that could be read.
        class_names: the classes.
        probabilities: float64 (pictures, classes).
        pixels: uint8 (shown pictures, channels, height, width), of the first of them, as seen.
        judged: what `Judgement.columns` says of each; empty without one.
    """

    paths: list[str]
    class_names: tuple[str, ...]
    probabilities: Tensor
    pixels: Tensor
    judged: list[list[str]]

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
    counts = ", ".join(f"{printable_name(name)} {n}" for name, n in support.counts.items())
    lines = [
        f"{trained.path}, after meta-step {trained.step}: {config.algo.name} on {config.data.name}",
        f"pictures, as in training: {inputs_of_run(trained)}",
        f"support: {len(support.labels)} pictures of {len(support.class_names)} classes ({counts})",
        f"batch norm: {trained.setup.batch_norm}",
    ]
    if (why := trained.predict_together) is not None:
        lines.append(f"a label depends on the other pictures of its batch: {why}")
    return lines


def trust(found: Predictions, judgement: Judgement | None) -> list[str]:
    """How far the labels are to be trusted, for people to read."""
    if judgement is None:
        return [
            "probabilities are the network's own, not calibrated; calibrate=true compares with the "
            "data of the run"
        ]
    sets, none, far = zip(*found.judged, strict=True)
    middle = torch.tensor(list(map(float, far))).quantile(0.5)
    sizes = [len(labels_in(row)) for row in sets]
    own, coverage, alarms = judgement.calibration, judgement.coverage, judgement.false_alarms
    return [
        f"calibrated on {len(own.misfits)} validation tasks of so many classes and examples, with "
        f"{own.seen} classes in all; it holds as far as these classes are like those of the run's "
        "data:",
        f"  label sets for a coverage of {100 * coverage:g} % have "
        f"{sum(sizes) / len(sizes):.2f} labels on average",
        f"  {so_many(sum(map(bool, none)), 'is called', 'are called')} none of these, at "
        f"{100 * alarms:g} % false alarms",
        *too_few(own.seen, coverage, alarms),
        f"  unfamiliarity {middle:.0f} % (median): as many of the run's validation pictures are "
        "nearer to its training pictures, in pixels; 50 % is usual, 100 % is far away",
    ]


def so_many(count: int, one: str = "", more: str = "") -> str:
    """How many pictures, and the verb that goes with so many."""
    return f"{count} picture{'s' * (count != 1)} {one if count == 1 else more}".rstrip()


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


def label_pictures(
    trained: Trained,
    support: Labelled,
    paths: Sequence[str],
    *,
    judgement: Judgement | None = None,
    batch: int | None = None,
    skip_unreadable: bool = False,
    shown: int = 0,
) -> Predictions:
    """Adapt to the support set, then label pictures.

    Args:
        trained: the run.
        support: pictures of each class.
        paths: files of the pictures to be labelled.
        judgement: how far to trust the scores; None: as they are.
        batch: how many are labelled together; None: as many as in an evaluation of the run.
        skip_unreadable: leave out pictures that cannot be read.
        shown: of how many, the first ones, the pixels are kept.

    Raises:
        ConfigError: the run's network cannot tell so many classes apart.
        DataError: a picture cannot be read, or none can.
        RunError: the scores are no finite numbers.
    """
    inputs, predict = inputs_of_run(trained), adapted(trained, support)
    kept: dict[int, _Kept] = {}
    pixels: dict[int, Tensor] = {}
    for places, own in _read(paths, inputs, batch or usual_batch(trained), skip_unreadable):
        if not places:
            continue
        x = trained.to_inputs(own)
        scores = checked(predict(x))
        columns: list[list[str]] = [[]] * len(places)
        if judgement is None:
            probabilities = scores.softmax(1)
        else:
            probabilities = judgement.calibration.probabilities(scores)
            columns = judgement.columns(scores, x, support.class_names)
        kept |= dict(zip(places, map(_Kept, probabilities, columns), strict=True))
        pixels |= {place: one for place, one in zip(places, own, strict=True) if place < shown}
    if not kept:
        raise DataError(f"none of {len(paths)} pictures can be read")
    ordered = [kept[place] for place in sorted(kept)]
    seen = [torch.from_numpy(inputs.as_seen(pixels[place].numpy())) for place in sorted(pixels)]
    return Predictions(
        [paths[place] for place in sorted(kept)],
        support.class_names,
        torch.stack([one.probabilities for one in ordered]),
        torch.stack(seen) if seen else torch.empty(0, *inputs.shape, dtype=torch.uint8),
        [] if judgement is None else [one.columns for one in ordered],
    )


class _Kept(NamedTuple):
    probabilities: Tensor
    columns: list[str]


def _read(
    paths: Sequence[str], inputs: Inputs, size: int, skip_unreadable: bool
) -> Iterator[tuple[list[int], Tensor]]:
    with tqdm(total=len(paths), desc="labelling", unit="picture", disable=None) as bar:
        for chosen in batches_of(len(paths), size):
            pictures = [Picture(paths[place]) for place in chosen]
            pixels, there = read_pictures(pictures, inputs, skip_unreadable)
            yield [chosen[place] for place in there], pixels
            bar.update(len(chosen))
