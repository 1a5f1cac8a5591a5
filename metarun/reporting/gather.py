"""From directories to runs: whatever lies in them, each run is read or named as unreadable.

What is read may be cut short, of another program, or hostile: every field is checked, text
loses its control characters, and nothing is executed or resolved.
"""

import hashlib
import os
import socket
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.config.catalogue import GROUPS
from metarun.config.run import EVEN, flat, without_nothing
from metarun.config.shape import shots, ways
from metarun.errors import ConfigError
from metarun.reporting.evaluations import Calibrated, Confused, read_closer
from metarun.reporting.reading import LIMIT, bounded, clean, finite, finite_or_nan
from metarun.rundir import SWEEP_FILE
from metarun.rundir.checkpoint_files import newest_step
from metarun.rundir.metrics import read_metrics
from metarun.rundir.provenance import codes_of
from metarun.system.untrusted import json_object, yaml_mapping

RUN_FILES = ("config.yaml", "status.json", "result.json")  # a folder with one of them may be a run
SAMPLED = "episodes:"  # begins an identity that was computed from episodes
OWN_FOLDERS = ("checkpoints", "tb", "wandb")  # of a run; no run lies in them


@dataclass(frozen=True)
class Figures:
    """The final figures of a completed run.

    Attributes:
        score: "accuracy" or "mse".
        value: mean score over the test tasks, or over the test examples of one model.
        ci95: half-width of its confidence interval over them; None if there is none.
        episodes: how many they are.
        scores: mean score by inner step, from before the first; NaN where it is not finite.
        losses: likewise, the query loss.
        validation: the best validation score, whose model was tested.
        content: which data it saw, briefly; None if that is not known.
        by_task: the score of each test task, or example, by its number; empty if they are not
            known, NaN where one is not finite.
        inner_loop: whether it takes inner steps, with the inner optimizer.
        classes: that one model tells apart; None where tasks were solved.
        task_set: the name of the test tasks; None if it is not known.
        sources: of the test tasks, which take turns.
    """

    score: str
    value: float
    ci95: float | None
    episodes: int
    scores: list[float]
    losses: list[float]
    validation: float
    device: str
    train_seconds: float
    peak_memory_gib: float
    content: str | None = None
    by_task: Sequence[float] = ()
    inner_loop: bool = True
    classes: int | None = None
    task_set: str | None = None
    sources: int = 1

    @property
    def unit(self) -> str:
        """What the interval is over."""
        return "task" if self.classes is None else "example"


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        settings: its config by dotted key; without the inner optimizer, if it has turned out that
            there is no inner loop.
        status: what status.json says (completed, failed, interrupted, running …), but "killed" if
            it says that it is running and its process is gone, "never started" if there is none.
        error: why it failed, one line.
        test: its figures, if it is completed.
        log: its metrics.jsonl.
        saved: the meta-step of its newest checkpoint, by the files' names; 0 if it has none.
        codes: what it was made with, as of `metarun.rundir.provenance.codes_of`.
    """

    directory: Path
    settings: dict[str, Any]
    status: str
    error: str | None
    test: Figures | None
    log: list[dict[str, Any]]
    saved: int
    codes: tuple[str, ...]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings["seed"])

    @property
    def shape(self) -> str:
        """The shape of its tasks, or how many classes one model tells apart."""
        shot, query = (self.settings.get(f"task.{key}") for key in ("shot", "query"))
        if self.test is not None and self.test.classes is not None:
            return f"{self.test.classes} classes"
        if self.test is not None and self.test.score == "accuracy":
            shape = {key: self.settings.get(f"task.{key}") for key in ("way", "shot", *EVEN)}
            return f"{ways(shape)} {shots(shape)}, {query} queries a class"
        return f"{shot} shots, {query} queries"

    @property
    def progress(self) -> str:
        """Meta-steps that it has logged or saved, of those it is to take."""
        total = self.settings["trainer.steps"]
        logged = max((entry["step"] for entry in self.log), default=0)
        return f"{max(logged, min(self.saved, total))}/{total}"


@dataclass(frozen=True)
class Gathered:
    """What was found.

    Attributes:
        refused: (directory, error) of a sweep's runs that failed before they had a directory.
        skipped: (directory, reason) of what looks like a run and is none that can be read.
        calibrated: evaluations with calibrate=true, the least error first.
        confused: evaluations with confusion=true.
    """

    runs: list[Run]
    refused: list[tuple[Path, str]]
    skipped: list[tuple[Path, str]]
    calibrated: list[Calibrated]
    confused: list[Confused]


def gather(roots: Sequence[str | Path]) -> Gathered:
    """Read all runs in and below the given directories, each once.

    Raises:
        ConfigError: one of them is not there.
    """
    found = Gathered([], [], [], [], [])
    seen = set()
    for root in map(Path, roots):
        if not root.is_dir():
            what = "is no directory" if root.exists() else "is not there"
            raise ConfigError(
                f"{root} {what}: give run directories, sweep directories or folders of them"
            )
        for folder, is_run in _candidates(root, found.skipped):
            if (which := (folder.resolve(), is_run)) in seen:
                continue
            seen.add(which)
            try:
                if is_run and (own := read_closer(folder)) is not None:
                    found.calibrated.extend(filter(None, [own.calibrated]))
                    found.confused.extend(filter(None, [own.confused]))
                elif is_run:
                    found.runs.append(read_run(folder))
                else:
                    found.refused.extend(_refused(folder))
            except (OSError, ValueError, RecursionError) as error:
                found.skipped.append((folder, clean(_words(error))))
    found.calibrated.sort(key=lambda own: own.ece)
    return found


def read_run(folder: str | Path) -> Run:
    """Read one run directory.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no run, or damaged; the message says which file.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists() and "ckpt" in json_object(folder / "result.json"):
        raise ValueError("an evaluation, not a training run")
    settings = _settings(folder / "config.yaml")
    status = json_object(folder / "status.json")
    provenance = json_object(folder / "provenance.json")
    state = clean(str(status.get("status", "never started")))[:40]
    if state == "running" and _is_gone(provenance):
        state = "killed"
    error = status.get("error")
    test = _test(folder / "result.json", settings) if state == "completed" else None
    if test is not None and not test.inner_loop:
        settings = {k: v for k, v in settings.items() if not k.startswith("inner_opt.")}
    return Run(
        directory=folder,
        settings=settings,
        status=state,
        error=clean(str(error))[:500] if error else None,
        test=test,
        log=read_metrics(folder / "metrics.jsonl"),
        saved=newest_step(folder / "checkpoints"),
        codes=tuple(map(clean, codes_of(provenance))),
    )


def _candidates(root: Path, skipped: list[tuple[Path, str]]) -> Iterator[tuple[Path, bool]]:
    """Run directories (True) and sweep directories (False) in and below `root`."""

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), clean(_words(error))))

    for name, folders, files in os.walk(root, onerror=unreadable):
        folders.sort()
        if any(name in files for name in RUN_FILES):
            folders[:] = [folder for folder in folders if folder not in OWN_FOLDERS]
            yield Path(name), True
        if SWEEP_FILE in files:
            yield Path(name), False


def _refused(folder: Path) -> list[tuple[Path, str]]:
    """The runs that a sweep could not start: their settings were wrong."""
    runs = json_object(folder / SWEEP_FILE).get("runs")
    if not isinstance(runs, dict):
        raise ValueError(f"{SWEEP_FILE} is damaged")
    return [
        (folder / clean(name), clean(str(entry.get("error")))[:500])
        for name, entry in runs.items()
        if isinstance(entry, dict)
        and entry.get("status") == "failed"
        and not (folder / name / "config.yaml").exists()
    ]


def _settings(path: Path) -> dict[str, Any]:
    """The flat config of a run."""
    config = yaml_mapping(path)
    settings = without_nothing(flat(config)) if _plain_keys(config) else {}
    needed = ["trainer.steps", "trainer.meta_batch", *(f"{group}.name" for group in GROUPS)]
    if missing := [key for key in needed if key not in settings]:
        raise ValueError(f"config.yaml is no config of metarun: {missing[0]} is not there")
    for key, least in (("seed", 0), ("trainer.steps", 1), ("trainer.meta_batch", 1)):
        if type(value := settings.get(key)) is not int or not least <= value < LIMIT:
            raise ValueError(f"config.yaml: {key} is no integer from {least}")
    return {clean(key): _tame(value) for key, value in settings.items()}


def _tame(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= LIMIT:
        raise ValueError("config.yaml: a number is beyond all bounds")
    return clean(value) if isinstance(value, str) else value


def _plain_keys(config: dict[Any, Any]) -> bool:
    return all(
        isinstance(key, str) and (not isinstance(value, dict) or _plain_keys(value))
        for key, value in config.items()
    )


def _test(path: Path, settings: dict[str, Any]) -> Figures:
    result = json_object(path)
    if not result:
        raise ValueError("completed, but result.json is missing or damaged: repeat its command")
    # None: an older result; 0: of what meta-learns nothing.
    if (steps := result.get("steps")) not in (None, 0, settings["trainer.steps"]):
        raise ValueError(
            f"result.json is of {clean(repr(steps))[:50]} meta-steps and config.yaml of "
            f"{settings['trainer.steps']}: repeat its command"
        )
    try:
        test = result["test"]
        score = test["score"]
        if score not in ("accuracy", "mse"):
            raise ValueError(f"unknown score {score!r:.50}")
        ci95, classes = test["ci95"], test.get("classes")
        each = "task" if classes is None else "example"
        return Figures(
            score=score,
            value=finite(test[score]),
            ci95=None if ci95 is None else finite(ci95),
            episodes=int(bounded(test["episodes" if classes is None else "examples"])),
            scores=[finite_or_nan(value) for value in test[f"{score}_per_inner_step"]],
            losses=[finite_or_nan(value) for value in test["loss_per_inner_step"]],
            validation=finite(result["best"]["score"]),
            device=clean(str(result["device"])),
            train_seconds=bounded(result["train_seconds"]),
            peak_memory_gib=bounded(result["peak_memory_gib"]),
            content=_content(test.get("data_identity")),
            by_task=array("d", map(finite_or_nan, test.get(f"{score}_per_{each}", ()))),
            inner_loop=test.get("inner_steps", 0) is not None,
            classes=None if classes is None else int(bounded(classes)),
            task_set=None if (named := test.get("task_set")) is None else clean(str(named))[:40],
            sources=len(test.get("per_source", ())) or 1,
        )
    except KeyError as error:
        raise ValueError(f"result.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"result.json holds no finite figures: {error}") from error


_LONGEST = 19  # characters of a content's name


def _content(identity: Any) -> str | None:
    """An identity in as much of its text as tells it from others.

    One that was taken from episodes says nothing here: it changes with the seed.
    """
    if not isinstance(identity, str) or identity.startswith(SAMPLED):
        return None
    text = clean(identity)
    if text.startswith("sha256:") or len(text) <= _LONGEST:
        return text[:_LONGEST]
    digest = hashlib.sha256(identity.encode(errors="replace")).hexdigest()
    return f"{text[: _LONGEST - 9]}…{digest[:8]}"  # others may begin as it does


def _is_gone(provenance: dict[str, Any]) -> bool:
    """Whether the process of a run that says it is running is known to be gone."""
    pid = provenance.get("pid")
    if type(pid) is not int or pid < 1 or provenance.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
