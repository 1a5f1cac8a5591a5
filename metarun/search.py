"""A search for the best validation score: Optuna chooses the runs, a sweep carries them out.

The study lies in the sweep's directory, in a journal that survives its writer, so the same
command goes on with it: runs that were cut off are finished, then come new ones.
"""

import logging
from collections.abc import Mapping, Sequence
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

from metarun.algos.base import OBJECTIVES
from metarun.checks import at_least, one_of
from metarun.errors import ConfigError, RunError
from metarun.files import write_text
from metarun.job import Outcome
from metarun.rundir import read_json
from metarun.sweep import Job, Sweep

log = logging.getLogger(__name__)

JOURNAL = "optuna.log"
RESULTS = "optimization_results.yaml"


def search(sweep: Sweep, given: Sequence[Override], settings: Mapping[str, Any]) -> None:
    """Run trials until there are `n_trials` of them, and print the best.

    Failed runs are failed trials; the search goes on without them.

    Args:
        given: the command line's overrides; those with a range or several values are searched.
        settings: `metarun.launchers.OptunaConfig`.

    Raises:
        ConfigError: the search space or a setting is wrong.
        RunError: no trial came to an end.
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
    study = _study(sweep, settings)
    jobs: dict[int, Job] = {}
    for trial in study.trials:
        if trial.state != TrialState.FAIL and set(trial.params) == set(space):
            jobs[trial.number] = sweep.add([*fixed, *_overrides(trial.params)])
        elif trial.state == TrialState.RUNNING:  # of another search space
            study.tell(trial.number, state=TrialState.FAIL)
    cut_off = [t.number for t in study.get_trials(states=(TrialState.RUNNING,))]
    size = settings["n_jobs"]
    while cut_off or len(study.trials) < settings["n_trials"]:
        batch, cut_off = cut_off[:size], cut_off[size:]
        for _ in range(min(size - len(batch), settings["n_trials"] - len(study.trials))):
            asked = study.ask(space)
            jobs[asked.number] = sweep.add([*fixed, *_overrides(asked.params)])
            batch.append(asked.number)
        sweep.refuse_if_nothing_can_start()
        sweep.launch([jobs[number] for number in batch])
        for number in batch:
            _tell(study, number, jobs[number])
    failures = sweep.summarise()
    if failures:
        log.warning("%s", failures)
    _report(study, jobs, sweep)


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


def _study(sweep: Sweep, settings: Mapping[str, Any]) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(sweep.directory / JOURNAL)))
    # Scores are told so that more is better, since which they are is known after the first run.
    study = optuna.create_study(
        storage=storage, study_name="metarun", direction="maximize", load_if_exists=True
    )
    seed = settings["seed"] + len(study.trials)  # or it would repeat what it asked before
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study.sampler = kinds[settings["sampler"]](seed=seed)
    return study


def _overrides(params: Mapping[str, Any]) -> list[str]:
    """Settings as one types them; six digits are enough for what is searched."""
    shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in params.items()}
    return [f"{key}={value}" for key, value in shown.items()]


def _tell(study: optuna.Study, number: int, job: Job) -> None:
    outcome = job.outcome
    assert outcome is not None
    if outcome.score is None:
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, outcome.score if _higher_is_better(job) else -outcome.score)


def _higher_is_better(job: Job) -> bool:
    """Of the score of a run that has ended."""
    result = read_json(job.directory / "result.json")
    parts = [part for part in result.values() if isinstance(part, dict)]
    names = [part["score"] for part in parts if "score" in part]
    return any(o.higher_is_better for o in OBJECTIVES.values() if o.score_name in names)


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
    outcome: Outcome | None = job.outcome if job else None
    score = outcome.score if outcome else best.value
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
