"""Evaluations among runs: those that were calibrated are in a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.reporting.reading import bounded, clean, finite, finite_or_nan
from metarun.system.untrusted import json_object

MOST_BINS = 1000


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


def read_calibration(folder: Path) -> Calibrated | None:
    """What a directory of an evaluation says of its calibration; None: it is not that.

    Raises:
        OSError: a file cannot be read.
        ValueError: its figures are damaged.
    """
    if (folder / "config.yaml").exists():
        return None
    result = json_object(folder / "result.json")
    if "ckpt" not in result:
        return None
    for split, figures in result.items():
        if isinstance(figures, dict) and "calibration" in figures:
            return _calibrated(folder, result["ckpt"], split, figures["calibration"])
    return None


def _calibrated(folder: Path, checkpoint: Any, split: str, own: Any) -> Calibrated:
    try:
        return Calibrated(
            directory=folder,
            checkpoint=clean(str(checkpoint)),
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
