"""A search for the best validation score: Optuna chooses the runs, a sweep carries them out.

The study lies in the sweep's directory, in a journal that survives its writer, so the same
command goes on with it: runs that were cut off are finished, then come new ones.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from metarun.components.algo.base import OBJECTIVES
from metarun.config.catalogue import GROUPS
from metarun.config.checks import at_least, one_of
from metarun.config.run import NEUTRAL_KEYS
from metarun.errors import ConfigError, RunError
from metarun.rundir.directory import read_json
from metarun.sweeps.sweep import Job, Sweep
from metarun.system.files import LockedError, locked, write_text

log = logging.getLogger(__name__)

JOURNAL = "optuna.log"
LOCK = ".optuna.lock"
RESULTS = "optimization_results.yaml"
NAME = "metarun"
"""Of the study in the journal."""


def search(sweep: Sweep, given: Sequence[Override], settings: Mapping[str, Any]) -> None:
    """Run trials until there are `n_trials` of them, and print the best.

    Failed runs are failed trials; the search goes on without them.

    Args:
        given: the command line's overrides; those with a range or several values are searched.
        settings: `metarun.config.launchers.OptunaConfig`.

    Raises:
        ConfigError: the search space or a setting is wrong, no trial could be started, or the
            directory holds another search.
        RunError: no trial came to an end, or another process searches in this directory.
    """
    for name in ("n_trials", "n_jobs"):
        at_least(f"hydra.sweeper.{name}", settings[name], 1)
    one_of("hydra.sweeper.sampler", settings["sampler"], ("tpe", "random"))
    space = {o.get_key_element(): distribution(o) for o in given if o.is_sweep_override()}
    if not space:
        raise ConfigError(
            "nothing to search: give key=interval(low,high), tag(log,interval(low,high)), "
            "range(first,last+1) or key=a,b,c"
        )
    fixed = [str(o.input_line) for o in given if o.get_key_element() not in space]
    _refuse_lacking(sweep, fixed, space)
    with _locked(sweep.directory):
        repair(sweep.directory / JOURNAL)
        study = _study(sweep, settings, {"space": _shown(space), "fixed": _lasting(fixed)})
        jobs = _run_trials(study, sweep, settings, fixed, space)
        if jobs:
            sweep.refuse_if_nothing_can_start()
        failures = sweep.summarise()
        if failures:
            log.warning("%s", failures)
        _report(study, jobs, sweep)


def _refuse_lacking(sweep: Sweep, fixed: list[str], space: Mapping[str, BaseDistribution]) -> None:
    """Refuse a search that would find out in some trial that an option lacks a searched setting.

    Raises:
        Hydra's errors of composition: an option lacks one.
    """
    lists = {k: d.choices for k, d in space.items() if isinstance(d, CategoricalDistribution)}
    first = {key: choices[0] for key, choices in lists.items()}
    for key, meaning in space.items():
        if isinstance(meaning, IntDistribution | FloatDistribution):
            first[key] = meaning.low
    for group in (key for key in lists if key in GROUPS):
        for option in lists[group]:
            sweep.check([*fixed, *(f"{k}={v}" for k, v in {**first, group: option}.items())])


def _run_trials(
    study: optuna.Study,
    sweep: Sweep,
    settings: Mapping[str, Any],
    fixed: list[str],
    space: dict[str, BaseDistribution],
) -> dict[int, Job]:
    """Finish the trials that were cut off, then run new ones; the jobs by number of trial."""
    jobs: dict[int, Job] = {}
    for trial in study.trials:
        if trial.state != TrialState.FAIL and set(trial.params) == set(space):
            jobs[trial.number] = sweep.add([*fixed, *_overrides(trial.params)])
        elif trial.state == TrialState.RUNNING:  # cut off while its values were chosen
            study.tell(trial.number, state=TrialState.FAIL)
    cut_off = [t.number for t in study.get_trials(states=(TrialState.RUNNING,))]
    size = settings["n_jobs"]
    while cut_off or len(study.trials) < settings["n_trials"]:
        batch, cut_off = cut_off[:size], cut_off[size:]
        for _ in range(min(size - len(batch), settings["n_trials"] - len(study.trials))):
            asked = study.ask(space)
            try:
                jobs[asked.number] = sweep.add([*fixed, *_overrides(asked.params)])
            except BaseException:  # or the next call would take it for cut off
                study.tell(asked.number, state=TrialState.FAIL)
                raise
            batch.append(asked.number)
        sweep.launch([jobs[number] for number in batch])
        for number in batch:
            _tell(study, number, jobs[number])
    return jobs


def distribution(override: Override) -> BaseDistribution:
    """What `key=interval(…)`, `range(…)` or `a,b,c` means to Optuna."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        logarithmic = "log" in value.tags
        if not value.start < value.end or (logarithmic and value.start <= 0):
            raise ConfigError(f"{override.input_line}: not an interval, or not one for a logarithm")
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=logarithmic)
        return FloatDistribution(value.start, value.end, log=logarithmic)
    if isinstance(value, RangeSweep):
        values = list(value.range())
        if values and all(isinstance(v, int) for v in values) and value.step > 0:
            return IntDistribution(values[0], values[-1], step=int(value.step))
        return CategoricalDistribution(values)
    return CategoricalDistribution(list(override.sweep_string_iterator()))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep a second search out: it would take our running trials for cut off."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(directory / LOCK))
        except LockedError as error:
            raise RunError(
                f"another process is searching in {directory} ({error}): wait for it, or end it, "
                "or choose another hydra.sweep.dir"
            ) from error
        yield


def repair(journal: Path) -> None:
    """Cut a journal back to the part before its first damaged line, and say so.

    A line is torn if its writer was killed or the disk was full; Optuna reads no such journal.
    What comes behind refers to what is lost. The file as it was is kept beside it.
    """
    if not journal.is_file():
        return
    sound = 0
    with open(journal, "rb") as file:
        for line in file:
            if not _is_entry(line):
                break
            sound += len(line)
    if sound == journal.stat().st_size:
        return
    kept = journal.with_name(f"{journal.name}.damaged")
    shutil.copyfile(journal, kept)
    os.truncate(journal, sound)
    log.warning(
        "%s was damaged: going on with what comes before; the whole file is in %s", journal, kept
    )


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return line.endswith(b"\n") and isinstance(entry, dict) and "op_code" in entry


def _study(
    sweep: Sweep, settings: Mapping[str, Any], wanted: dict[str, dict[str, str]]
) -> optuna.Study:
    """The study of a directory, new or as it was left.

    Raises:
        ConfigError: it is one of other settings than wanted.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(sweep.directory / JOURNAL)))
    # Scores are told so that more is better, since which they are is known after the first run.
    study = optuna.create_study(
        storage=storage, study_name=NAME, direction="maximize", load_if_exists=True
    )
    there = study.user_attrs.get("settings")
    if there is not None and there != wanted:
        if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)):
            raise ConfigError(
                f"{sweep.directory} holds another search: {_difference(there, wanted)}. Choose "
                "another hydra.sweep.dir"
            )
        optuna.delete_study(study_name=NAME, storage=storage)  # nothing ever ran with them
        study = optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
    study.set_user_attr("settings", wanted)
    seed = settings["seed"] + len(study.trials)  # or it would repeat what it asked before
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study.sampler = kinds[settings["sampler"]](seed=seed)
    return study


def _shown(space: Mapping[str, BaseDistribution]) -> dict[str, str]:
    return {key: str(meaning) for key, meaning in space.items()}


def _lasting(fixed: Sequence[str]) -> dict[str, str]:
    """The settings that a run keeps for life, by key."""
    values = {key: value for key, _, value in (o.partition("=") for o in fixed)}
    return {key: value for key, value in values.items() if key.lstrip("+") not in NEUTRAL_KEYS}


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Which settings two searches do not share, for a message."""
    lines = []
    for part in ("space", "fixed"):
        old, new = there[part], wanted[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                values = (d.get(key, "not given") for d in (old, new))
                lines.append("{}: {} there, {} here".format(key, *values))
    return "; ".join(lines)


def _overrides(params: Mapping[str, Any]) -> list[str]:
    """Settings as one types them; six digits are enough for what is searched."""
    shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in params.items()}
    return [f"{key}={value}" for key, value in shown.items()]


def _tell(study: optuna.Study, number: int, job: Job) -> None:
    outcome = job.outcome
    assert outcome is not None
    sign = None if outcome.score is None else _sign(job)
    if outcome.score is None or sign is None:
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        return
    study.set_user_attr("sign", sign)
    study.tell(number, sign * outcome.score, skip_if_finished=True)


def _sign(job: Job) -> int | None:
    """1 if a higher score of a run that has ended is better, -1 if a lower one is.

    None where its result does not say: a guess could take the worst run for the best.
    """
    result = read_json(job.directory / "result.json")
    parts = [part for part in result.values() if isinstance(part, dict)]
    names = [part["score"] for part in parts if "score" in part]
    for objective in OBJECTIVES.values():
        if objective.score_name in names:
            return 1 if objective.higher_is_better else -1
    log.warning("%s does not say what its score is: the trial is not counted", job.directory)
    return None


def _report(study: optuna.Study, jobs: Mapping[int, Job], sweep: Sweep) -> None:
    """Print the best trial and write it to the sweep's directory.

    Raises:
        RunError: there is none.
    """
    done = study.get_trials(states=(TrialState.COMPLETE,))
    if not done:
        raise RunError("no trial came to an end, so there is no best one")
    best = study.best_trial
    job = jobs.get(best.number)
    score = study.user_attrs.get("sign", -1) * study.best_value
    result = {
        "name": "optuna",
        "best_evaluated_params": dict(o.split("=", 1) for o in _overrides(best.params)),
        "best_evaluated_value": score,
        "best_run": job.directory.name if job else None,
        "trials": len(study.trials),
        "failed": len(study.get_trials(states=(TrialState.FAIL,))),
    }
    write_text(sweep.directory / RESULTS, OmegaConf.to_yaml(OmegaConf.create(result)))
    chosen = " ".join(_overrides(best.params))
    where = f", in {job.directory}" if job else ""
    print(f"best of {len(done)} trials: validation score {score:.6g} with {chosen}{where}")
