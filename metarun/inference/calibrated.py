"""A run calibrated on its validation tasks, and what that is worth on others."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.inference import calibration
from metarun.inference.outcomes import Outcomes, drawn_source_of, outcomes
from metarun.inference.trained import Trained
from metarun.training.setup import Setup


class Calibration(NamedTuple):
    """What validation tasks tell of a run's scores.

    Attributes:
        temperature: what scores are divided by.
        misfits: float64 (tasks, queries), of the true labels.
        strangeness: float64 (tasks, queries), of queries of the classes of their task.
        classes: int64 (tasks, queries), the number of the query's class.
    """

    temperature: float
    misfits: Tensor
    strangeness: Tensor
    classes: Tensor

    @property
    def seen(self) -> int:
        """How many classes the tasks have."""
        return len(torch.unique(self.classes))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Calibrated probabilities of scores (…, way), float64."""
        return (scores.double() / self.temperature).softmax(-1)

    def sets(self, scores: Tensor, coverage: float) -> Tensor:
        """Which labels are in the set of each query, bool (…, way).

        The true label of a query of a new class is in it with a probability of `coverage` or more.
        Where too few classes were seen for that, all labels are.
        """
        bound = calibration.class_quantile(self.misfits, self.classes, coverage)
        return calibration.label_sets(self.probabilities(scores), bound)

    def is_none(self, scores: Tensor, false_alarms: float) -> Tensor:
        """Which queries are called none of the classes, bool (…).

        Of queries that are of one, a fraction of `false_alarms` or less is. Where too few classes
        were seen for that, none is.
        """
        bound = calibration.class_quantile(self.strangeness, self.classes, 1 - false_alarms)
        return calibration.strangeness(scores) > bound


def calibrate(found: Outcomes) -> Calibration:
    """Calibrate on tasks."""
    temperature = calibration.fit_temperature(found.scores, found.labels)
    probabilities = (found.scores / temperature).softmax(-1)
    return Calibration(
        temperature,
        calibration.misfit(probabilities, found.labels),
        calibration.strangeness(found.scores),
        found.classes,
    )


def measured(
    own: Calibration, found: Outcomes, coverage: float, false_alarms: float
) -> dict[str, Any]:
    """What a calibration is worth on other tasks, as plain values.

    Args:
        own: from validation tasks.
        found: of other tasks.
        coverage: what label sets are to cover.
        false_alarms: what fraction of known queries may be called none.
    """
    before = calibration.reliability(found.scores.softmax(-1), found.labels)
    after = calibration.reliability(own.probabilities(found.scores), found.labels)
    sets = own.sets(found.scores, coverage)
    covered = sets.gather(-1, found.labels[..., None])[..., 0]
    coverage_found = calibration.rate_over_classes(covered, found.classes)
    alarms = own.is_none(found.scores, false_alarms)
    alarms_found = calibration.rate_over_classes(alarms, found.classes)
    sizes = sets.sum(-1).double()
    figures = {
        "calibration_tasks": len(own.misfits),
        "calibration_classes": own.seen,
        "tasks": len(found.labels),
        "temperature": own.temperature,
        "ece_before": calibration.calibration_error(before),
        "ece": calibration.calibration_error(after),
        "coverage": coverage,
        "measured_coverage": coverage_found[0],
        "measured_coverage_ci95": coverage_found[1],
        "labels_in_a_set": float(sizes.mean()),
        "empty_sets": float((sizes == 0).double().mean()),
        "false_alarms": false_alarms,
        "measured_false_alarms": alarms_found[0],
        "measured_false_alarms_ci95": alarms_found[1],
        "reliability_before": [one._asdict() for one in before],
        "reliability": [one._asdict() for one in after],
    }
    if found.unknown is not None:
        flagged = own.is_none(found.unknown, false_alarms)
        known, unknown = map(calibration.strangeness, (found.scores, found.unknown))
        figures["unknown_found"] = float(flagged.double().mean())
        figures["unknown_auroc"] = calibration.ranking(known, unknown)
    return figures


def refuse_calibration(setup: Setup, split: str) -> None:
    """Refuse to calibrate where that says nothing of new tasks, or cannot be done.

    Raises:
        ConfigError: the split is that of the calibration, the data are no labelled images or
            have fixed tasks, or several processes evaluate.
    """
    source = drawn_source_of(setup, "calibrate=true")
    if "val" not in source.splits:
        raise ConfigError(
            f"calibrate=true: data={setup.config.data.name} has no validation tasks to calibrate "
            "on; leave it out"
        )
    if split == "val":
        raise ConfigError(
            "calibrate=true calibrates on validation tasks, and would measure on the same ones: "
            "choose split=test"
        )


def calibrated_figures(
    trained: Trained, split: str, tasks: int, coverage: float, false_alarms: float, **progress: Any
) -> dict[str, Any]:
    """Calibrate on validation tasks, and measure on as many of another split.

    Args:
        trained: the run, with its data.
        progress: `on_progress` of `outcomes`.
    """
    own = calibrate(outcomes(trained, "val", tasks, **progress))
    return measured(own, outcomes(trained, split, tasks, **progress), coverage, false_alarms)


def lines(figures: dict[str, Any], split: str) -> list[str]:
    """What a person reads of the figures."""
    unknown = ""
    if "unknown_found" in figures:
        unknown = (
            f", and {_percent(figures['unknown_found'])} of those of other classes (AUROC "
            f"{figures['unknown_auroc']:.3f})"
        )
    return [
        f"calibrated on {figures['calibration_tasks']} validation tasks of "
        f"{figures['calibration_classes']} classes, measured on {figures['tasks']} {split} tasks "
        "(95 % CI over classes):",
        f"  temperature {figures['temperature']:.3g}; expected calibration error "
        f"{_percent(figures['ece'])}, {_percent(figures['ece_before'])} without",
        f"  label sets for a coverage of {100 * figures['coverage']:g} % cover "
        f"{_rate(figures, 'measured_coverage')}; they have {figures['labels_in_a_set']:.2f} "
        f"labels on average, and {_percent(figures['empty_sets'])} are empty",
        f"  none of these, at {100 * figures['false_alarms']:g} % false alarms: said of "
        f"{_rate(figures, 'measured_false_alarms')} of the queries{unknown}",
        *too_few(figures["calibration_classes"], figures["coverage"], figures["false_alarms"]),
    ]


def too_few(classes: int, coverage: float, false_alarms: float | None = None) -> list[str]:
    """What a person reads where too few validation classes were seen for a promise.

    Args:
        classes: how many there were.
        coverage, false_alarms: what was promised; None: nothing.
    """
    promises = [(f"a coverage of {100 * coverage:g} %", coverage, "each set has all labels")]
    if false_alarms is not None:
        promises.append(
            (f"{100 * false_alarms:g} % false alarms", 1 - false_alarms,
             "nothing is called none of these")
        )  # fmt: skip
    return [
        f"  {classes} validation classes are too few for {told}, which takes {needed}: {so}"
        for told, level, so in promises
        if classes < (needed := calibration.classes_needed(level))
    ]


def _rate(figures: dict[str, Any], key: str) -> str:
    """A rate with its interval, which is over the classes of the split."""
    return f"{100 * figures[key]:.1f} ± {100 * figures[key + '_ci95']:.1f} %"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
