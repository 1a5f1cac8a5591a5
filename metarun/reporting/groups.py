"""Runs that differ in nothing but the seed make a group; groups are what a report compares."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from metarun.config.run import ADDED, EVEN, NEUTRAL_KEYS
from metarun.reporting.gather import Figures, Run
from metarun.reporting.labels import as_text, setting_texts, short_names, unique
from metarun.reporting.reading import LIMIT
from metarun.rundir.interval import half_width95
from metarun.rundir.metrics import ELAPSED

HIGHER_IS_BETTER = {"accuracy": True, "mse": False}
SAME_TASK = ("data.", "task.")
"""Settings that say what is solved; scores can be compared where they agree."""
LOGGED = ("trainer.log_every", "trainer.checkpoint_every")
"""Settings that change what is written down of a run, and not the run."""
ALONE = ("algo.name", "inner_opt.name")
"""What is shown where no setting differs, of those that there are."""
CONTENT = "data.content"  # stands for what the data are, where settings do not tell


@dataclass(frozen=True)
class Group:
    """Completed runs of one config with different seeds.

    Attributes:
        settings: the config by dotted key, without the seed.
        runs: one for each seed.
        label: a short name, unique in the report.
        shown: the settings that differ between groups; those that this one has.
    """

    settings: dict[str, Any]
    runs: list[Run]
    label: str
    shown: dict[str, Any]

    @cached_property
    def figures(self) -> list[Figures]:
        """The final figures of each run."""
        return [run.test for run in self.runs if run.test is not None]

    @property
    def score(self) -> str:
        """Name of the score."""
        return self.figures[0].score

    @property
    def value(self) -> float:
        """Mean test score over seeds."""
        return mean(figures.value for figures in self.figures)

    @property
    def ci95(self) -> float | None:
        """Half-width of the 95 % confidence interval of `value`; see `interval`."""
        if len(self.figures) == 1:
            return self.figures[0].ci95
        return confidence95([figures.value for figures in self.figures])

    @property
    def interval(self) -> str:
        """What the confidence interval is over: the seeds, or the tasks of the only one."""
        if len(self.figures) > 1:
            return f"{len(self.figures)} seeds"
        return f"{self.figures[0].episodes} {self.figures[0].unit}s of 1 seed"

    @property
    def validation(self) -> float:
        """Mean over seeds of the best validation score."""
        return mean(figures.validation for figures in self.figures)

    @property
    def seconds(self) -> float:
        """Mean duration of training with its validations."""
        return mean(figures.train_seconds for figures in self.figures)

    @property
    def memory_gib(self) -> float:
        """Highest peak memory of a run, in GiB."""
        return max(figures.peak_memory_gib for figures in self.figures)

    @property
    def device(self) -> str:
        """What it ran on."""
        return ", ".join(sorted({figures.device for figures in self.figures}))

    @cached_property
    def steps_per_second(self) -> float | None:
        """Meta-steps a second while training: the median over log lines, mean over seeds."""
        batch = self.settings["trainer.meta_batch"]
        speeds = [list(_column(run, "time/tasks_per_s").values()) for run in self.runs]
        return mean(median(s) / batch for s in speeds if s) if any(speeds) else None

    def curve(self, tag: str) -> dict[int, list[float]]:
        """Meta-step -> the values of a tag in each run; steps that all runs have."""
        return _shared([_column(run, tag) for run in self.runs])

    def validation_times(self) -> dict[int, float]:
        """Meta-step of a validation -> mean seconds that the runs had taken after it."""
        tag = f"val/{self.score}"
        columns = [
            {
                r["step"]: r[ELAPSED]
                for r in run.log
                if tag in r and isinstance(r.get(ELAPSED), float) and abs(r[ELAPSED]) < LIMIT
            }
            for run in self.runs
        ]
        return {step: mean(values) for step, values in _shared(columns).items()}


@dataclass(frozen=True)
class Board:
    """Groups whose scores can be compared: of the same score on the same tasks.

    Attributes:
        title: what is solved.
        groups: best validation score first, so that test scores choose nothing.
        columns: the settings that differ between these groups, by dotted key.
    """

    title: str
    score: str
    groups: list[Group]
    columns: list[str]


def confidence95(values: Sequence[float]) -> float:
    """Half-width of the 95 % confidence interval of the mean of two values or more."""
    try:
        spread = stdev(values)
    except OverflowError:
        spread = math.inf
    return half_width95(spread, len(values))


def mean(values: Iterable[float]) -> float:
    """The mean of one value or more, also where their sum is too large for a float."""
    listed = list(values)
    try:
        return fmean(listed)
    except OverflowError:
        return math.fsum(value / len(listed) for value in listed)


def boards(runs: Iterable[Run]) -> tuple[list[Board], list[str]]:
    """Group the completed runs and put what can be compared on a board each.

    Returns:
        The boards, and notes on what a reader must know: seeds that occur twice (only the
        first such run is counted), code that differs.
    """
    notes = []
    seeds: dict[str, dict[int, Run]] = defaultdict(dict)
    completed = _told_apart([run for run in runs if run.test is not None])
    for run in completed:
        group = seeds[_key([compared_settings(run), _score(run)])]
        if (first := group.get(run.seed)) is not None:
            notes.append(
                f"{run.directory} repeats {first.directory} (same settings, same seed"
                f"{_other_score(run, first)}): it is not counted"
            )
        else:
            group[run.seed] = run
    codes = sorted({code for run in completed for code in run.codes})
    if len(codes) > 1:
        notes.append(f"made with different code: {', '.join(codes)}")
    by_task: dict[str, list[list[Run]]] = defaultdict(list)
    for group in seeds.values():
        members = [group[seed] for seed in sorted(group)]
        by_task[_key([task_settings(members[0]), _score(members[0])])].append(members)
    titles = _titles([groups[0][0] for groups in by_task.values()])
    return [_board(t, g) for t, g in zip(titles, by_task.values(), strict=True)], notes


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the content of their data as a setting where it is all that differs.

    The same settings can be of other data: a folder has changed, or `data.root` is another one.
    """
    contents: dict[str, set[str | None]] = defaultdict(set)
    for run in runs:
        contents[_key(task_settings(run))].add(_content(run))
    return [
        replace(run, settings=run.settings | {CONTENT: _content(run) or "not known"})
        if len(contents[_key(task_settings(run))] - {None}) > 1
        else run
        for run in runs
    ]


def _content(run: Run) -> str | None:
    return run.test.content if run.test is not None else None


def compared_settings(run: Run) -> dict[str, Any]:
    """What makes runs the same but for chance: all settings that matter without the seed."""
    left_out = {"seed", *NEUTRAL_KEYS, *LOGGED}
    return {k: v for k, v in run.settings.items() if k not in left_out}


def task_settings(run: Run) -> dict[str, Any]:
    """What a run's scores must share to be compared: the data and the shape of the tasks.

    Where the data lie is no part of it, nor what shape the training tasks had.
    """
    shape = {k: v for k, v in compared_settings(run).items() if k.startswith(SAME_TASK)}
    return {k: v for k, v in shape.items() if not k.startswith("task.train.")}


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values tell configs apart.

    A setting that only some have, such as the momentum of one optimizer among others, counts
    if it differs between those, or if nothing else tells two configs apart. What others do not
    have because they say nothing of it, such as an augmentation, counts.
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))
    chosen = {
        k
        for k in keys
        if len({_key(c[k]) for c in configs if k in c}) > 1
        or (k.startswith(ADDED) and not all(k in c for c in configs))
    }
    while True:
        alike: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for config in configs:
            alike[_key({k: config.get(k) for k in chosen})].append(config)
        more = {
            key
            for same in alike.values()
            for key in keys
            if key not in chosen and 0 < sum(key in config for config in same) < len(same)
        }
        if not more:
            return [key for key in keys if key in chosen]
        chosen |= more


def _board(title: str, members: list[list[Run]]) -> Board:
    configs = [compared_settings(runs[0]) for runs in members]
    columns = differing(configs)
    names = short_names(columns)
    labels, all_shown = [], []
    for config in configs:
        shown = {key: config[key] for key in columns if key in config}
        parts = setting_texts(shown, names)
        alone = [as_text(config[key]) for key in ALONE if key in config]
        labels.append(", ".join(parts or alone))
        all_shown.append(shown)
    groups = [
        Group(*parts) for parts in zip(configs, members, unique(labels), all_shown, strict=True)
    ]
    sign = -1 if HIGHER_IS_BETTER[groups[0].score] else 1
    groups.sort(key=lambda group: sign * group.validation)
    return Board(title, groups[0].score, groups, columns)


def _titles(firsts: Sequence[Run]) -> list[str]:
    """What each board's tasks are, with whatever else tells them apart."""
    configs = [task_settings(run) for run in firsts]
    shape = ("way", "shot", "query", *EVEN)
    said = ("data.name", "data.classes", *(f"task.{key}" for key in shape))
    more = [key for key in differing(configs) if key not in said]
    titles = []
    for run, config in zip(firsts, configs, strict=True):
        titles.append(f"{as_text(config['data.name'])}, {run.shape}{_listed(config, more)}")
    alike: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for title, config in zip(titles, configs, strict=True):
        alike[title].append(config)
    # A regression's title leaves out the way, which is nothing to it as a rule.
    left = {t: [k for k in differing(same) if k not in more] for t, same in alike.items()}
    return unique([t + _listed(c, left[t]) for t, c in zip(titles, configs, strict=True)])


def _listed(config: dict[str, Any], keys: Sequence[str]) -> str:
    return "".join(f", {key}={as_text(config[key])}" for key in keys if key in config)


def _other_score(run: Run, first: Run) -> str:
    if run.test is None or first.test is None or run.test.value == first.test.value:
        return ""
    return f", but a score of {run.test.value:.6g} and not {first.test.value:.6g}"


def _score(run: Run) -> str:
    return run.test.score if run.test is not None else ""


def _shared(columns: Sequence[dict[int, float]]) -> dict[int, list[float]]:
    steps = set.intersection(*(set(column) for column in columns))
    return {step: [column[step] for column in columns] for step in sorted(steps)}


def _column(run: Run, tag: str) -> dict[int, float]:
    """Meta-step -> value of a tag, where there is a finite one; a time within bounds."""
    found, largest = {}, LIMIT if tag.startswith("time/") else math.inf
    for entry in run.log:
        value = entry.get(tag)
        if isinstance(value, float) and abs(value) < largest:
            found[entry["step"]] = value
    return found


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
