"""Evaluations among runs: of those that looked closer, a report shows what they found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.reporting.reading import bounded, clean, finite, finite_or_nan
from metarun.system.untrusted import json_object

MOST_BINS = 1000
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Calibrated:
    """What `metarun eval calibrate=true` has measured.

    Attributes:
        checkpoint: what was evaluated.
        split: whose tasks, and how many `tasks`.
        temperature: what scores were divided by.
        ece: the expected calibration error; `ece_before`: without the temperature.
        coverage: what label sets were to cover; `measured_coverage`: what they do.
        bins: of the reliability diagram, with "predictions", "confidence" and "accuracy";
            `bins_before`: without the temperature.
    """

    directory: Path
    checkpoint: str
    split: str
    tasks: int
    temperature: float
    ece: float
    ece_before: float
    coverage: float
    measured_coverage: float
    labels_in_a_set: float
    bins: list[dict[str, float]]
    bins_before: list[dict[str, float]]


@dataclass(frozen=True)
class OneClass:
    """How a class did in an evaluation.

    Attributes:
        queries: how many of it were labelled.
        accuracy: how many of these were right, of 1.
        taken_for: what it was taken for most often; None: for nothing else.
        of: how many of its queries were in tasks with that class, and `mistaken` of them for it.
    """

    name: str
    queries: int
    accuracy: float
    taken_for: str | None
    mistaken: int
    of: int


@dataclass(frozen=True)
class Confused:
    """What `metarun eval confusion=true` has counted: its classes, the hardest first."""

    directory: Path
    checkpoint: str
    split: str
    classes: list[OneClass]


@dataclass(frozen=True)
class Closer:
    """What a directory of an evaluation says beyond its score; None: nothing of that kind."""

    calibrated: Calibrated | None = None
    confused: Confused | None = None


def read_closer(folder: Path) -> Closer | None:
    """What an evaluation found by looking closer; None: it is no evaluation that did.

    Raises:
        OSError: a file cannot be read.
        ValueError: its figures are damaged.
    """
    if (folder / "config.yaml").exists():
        return None
    result = json_object(folder / "result.json")
    if "ckpt" not in result:
        return None
    checkpoint = clean(str(result["ckpt"]))
    for split, figures in result.items():
        if isinstance(figures, dict) and {"calibration", "confusion"} & figures.keys():
            calibration, confusion = figures.get("calibration"), figures.get("confusion")
            return Closer(
                None
                if calibration is None
                else _calibrated(folder, checkpoint, split, calibration),
                None if confusion is None else _confused(folder, checkpoint, split, confusion),
            )
    return None


def _confused(folder: Path, checkpoint: str, split: str, own: Any) -> Confused:
    try:
        classes = []
        for name, figures in list(own["classes"].items())[:MOST_CLASSES]:
            pair = figures["mistake"]
            classes.append(
                OneClass(
                    clean(str(name)),
                    int(bounded(figures["queries"])),
                    finite(figures["accuracy"]),
                    None if pair is None else clean(str(pair["taken_for"])),
                    0 if pair is None else int(bounded(pair["queries"])),
                    0 if pair is None else int(bounded(pair["of"])),
                )
            )
    except KeyError as error:
        raise ValueError(f"result.json lacks {error} of its confusions") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"result.json holds no counts of confusions: {error}") from error
    classes.sort(key=lambda one: one.accuracy)
    return Confused(folder, checkpoint, clean(split), classes)


def _calibrated(folder: Path, checkpoint: str, split: str, own: Any) -> Calibrated:
    try:
        return Calibrated(
            directory=folder,
            checkpoint=checkpoint,
            split=clean(split),
            tasks=int(bounded(own["tasks"])),
            temperature=bounded(own["temperature"]),
            ece=finite(own["ece"]),
            ece_before=finite(own["ece_before"]),
            coverage=finite(own["coverage"]),
            measured_coverage=finite(own["measured_coverage"]),
            labels_in_a_set=finite(own["labels_in_a_set"]),
            bins=_bins(own["reliability"]),
            bins_before=_bins(own["reliability_before"]),
        )
    except KeyError as error:
        raise ValueError(f"result.json lacks {error} of its calibration") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"result.json holds no figures of a calibration: {error}") from error


def _bins(given: Any) -> list[dict[str, float]]:
    return [
        {
            "predictions": abs(bounded(one["predictions"])),
            "confidence": finite_or_nan(one["confidence"]),
            "accuracy": finite_or_nan(one["accuracy"]),
        }
        for one in given[:MOST_BINS]
    ]
