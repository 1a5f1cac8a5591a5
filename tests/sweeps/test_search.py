"""The search: what its directory may hold, and what becomes of its trials."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from metarun.errors import ConfigError, RunError
from metarun.sweeps.job import Outcome
from metarun.sweeps.search import JOURNAL, search
from metarun.sweeps.sweep import Job, Sweep, _left_behind, _recalled

SETTINGS = {"n_trials": 2, "n_jobs": 1, "sampler": "random", "seed": 0}
SPACE = ("inner_opt.lr=interval(0.01,0.1)",)


class FakeSweep:
    """Runs nothing: `score` is what becomes of a run, by its overrides; None: it is refused.

    Args:
        name: of the score in the result of each run; None: it has no result.
        recalled: whether all runs are there already, finished.
    """

    def __init__(
        self,
        directory: Path,
        score: Callable[[list[str]], float | None],
        name: str | None = "mse",
        recalled: bool = False,
    ) -> None:
        self.directory, self.score, self.name, self.recalled = directory, score, name, recalled
        self.jobs: list[Job] = []
        self.launched: list[Job] = []

    def add(self, overrides: Sequence[str]) -> Job:
        run = self.directory / "-".join(overrides).replace("/", "-")
        job = Job(list(overrides), run, {})
        if self.score(job.overrides) is None:
            job.outcome = Outcome("failed", error="a wrong value")
        elif self.recalled:
            self._end(job, "recalled")
        self.jobs.append(job)
        return job

    def refuse_if_nothing_can_start(self) -> None:
        seen = SimpleNamespace(jobs=dict(enumerate(self.jobs)), _launched=bool(self.launched))
        Sweep.refuse_if_nothing_can_start(cast(Any, seen))

    def launch(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.outcome is None:
                self._end(job, "completed")
                self.launched.append(job)

    def _end(self, job: Job, status: Any) -> None:
        job.outcome = Outcome(status, self.score(job.overrides))
        job.directory.mkdir(parents=True, exist_ok=True)
        if self.name is not None:  # the test says something else than validation
            result = {"test": {"score": self.name, self.name: 99.0}}
            (job.directory / "result.json").write_text(json.dumps(result))

    def summarise(self) -> str:
        return ""


def search_in(
    directory: Path,
    *arguments: str,
    score: Callable[[list[str]], float | None] = lambda overrides: 5.0,
    name: str | None = "mse",
    recalled: bool = False,
    **settings: Any,
) -> FakeSweep:
    sweep = FakeSweep(directory, score, name, recalled)
    given = OverridesParser.create().parse_overrides(list(arguments))
    search(cast(Sweep, sweep), given, SETTINGS | settings)
    return sweep


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[:-25], id="torn"),
        pytest.param(lambda text: text + b"\xff\x00\n", id="rubbish"),
        pytest.param(lambda text: text + b"17\n", id="no-entry"),
    ],
)
def test_a_damaged_journal_is_cut_back_and_kept(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search_in(tmp_path, *SPACE)
    journal = tmp_path / JOURNAL
    broken = damage(journal.read_bytes())
    journal.write_bytes(broken)
    sweep = search_in(tmp_path, *SPACE, n_trials=3)
    assert "was damaged" in caplog.text
    assert (tmp_path / f"{JOURNAL}.damaged").read_bytes() == broken
    assert len(sweep.jobs) == 3, "a trial was lost"
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_a_search_goes_on_when_its_first_trial_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def score(overrides: list[str]) -> float | None:
        tried.extend(o for o in overrides if o not in tried)
        return None if overrides[0] == tried[0] else 5.0

    sweep = search_in(tmp_path, *SPACE, score=score, n_trials=3)
    assert len(sweep.launched) == 2
    assert "best of 2 trials: validation score 5 " in capsys.readouterr().out


def test_a_search_of_wrong_settings_leaves_the_directory_to_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a wrong value"):
        search_in(tmp_path, *SPACE, "task.shot=0", score=lambda overrides: None)
    with pytest.raises(RunError, match="no trial came to an end"):  # all have been tried
        search_in(tmp_path, *SPACE, "task.shot=0", score=lambda overrides: None)
    assert len(search_in(tmp_path, *SPACE, "task.shot=1").launched) == 2


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (("algo.inner_steps=range(1,4)",), "algo.inner_steps: not given there"),
        ((*SPACE, "trainer.steps=25"), "trainer.steps: 20 there, 25 here"),
        (("inner_opt.lr=interval(0.01,0.2)", "trainer.steps=20"), "inner_opt.lr: FloatDistr"),
    ],
)
def test_another_search_in_the_same_directory_is_refused(
    other: tuple[str, ...], names: str, tmp_path: Path
) -> None:
    search_in(tmp_path, *SPACE, "trainer.steps=20", "device=cpu")
    with pytest.raises(ConfigError, match="holds another search") as refused:
        search_in(tmp_path, *other, n_trials=3)
    assert names in str(refused.value)


def test_what_does_not_change_a_run_may_change(tmp_path: Path) -> None:
    search_in(tmp_path, *SPACE, "trainer.steps=20", "trainer.keep_last=2")
    sweep = search_in(tmp_path, "trainer.keep_last=3", "trainer.steps=20", *SPACE, n_trials=3)
    assert len(sweep.jobs) == 3


def test_a_second_search_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    refusals: list[str] = []

    def score(overrides: list[str]) -> float:
        with pytest.raises(RunError, match="another process is searching in") as refused:
            search_in(tmp_path, *SPACE)
        refusals.append(str(refused.value))
        return 5.0

    search_in(tmp_path, *SPACE, score=score)
    assert refusals
    search_in(tmp_path, *SPACE, n_trials=3)  # the lock is free again


KNOWN = {"1": 0.5, "2": 0.3, "3": 0.7, "4": 0.6}
"""Scores by inner steps, of which each is tried."""


def known(overrides: list[str]) -> float:
    return KNOWN[overrides[0].removeprefix("algo.inner_steps=")]


@pytest.mark.parametrize(("name", "best"), [("accuracy", "3"), ("mse", "2")])
@pytest.mark.parametrize("recalled", [False, True])
def test_the_best_trial_has_the_highest_accuracy_or_the_lowest_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, best: str, recalled: bool
) -> None:
    """Also of runs that were there before, and also when the search is repeated."""
    space = ("algo.inner_steps=1,2,3,4",)
    for n_trials in (20, 24):
        sweep = search_in(
            tmp_path, *space, score=known, n_trials=n_trials, name=name, recalled=recalled
        )
        assert {job.overrides[0][-1] for job in sweep.jobs} == set(KNOWN)
        assert bool(sweep.launched) != recalled
        out = capsys.readouterr().out
        assert f"validation score {KNOWN[best]:g} with algo.inner_steps={best}, in " in out
        stored = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
        assert stored["best_evaluated_params"] == {"algo.inner_steps": best}
        assert stored["best_evaluated_value"] == KNOWN[best]
        assert stored["best_run"] == f"algo.inner_steps={best}"
        assert (stored["trials"], stored["failed"]) == (n_trials, 0)


def test_a_sampler_is_told_that_more_is_better(tmp_path: Path) -> None:
    for name, sign in (("accuracy", 1), ("mse", -1)):
        search_in(tmp_path / name, "algo.inner_steps=1,2,3,4", score=known, name=name, n_trials=9)
        storage = JournalStorage(JournalFileBackend(str(tmp_path / name / JOURNAL)))
        study = optuna.load_study(study_name="metarun", storage=storage)
        assert study.direction == optuna.study.StudyDirection.MAXIMIZE
        for trial in study.trials:
            assert trial.value == sign * KNOWN[trial.params["algo.inner_steps"]]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_every_seed_of_a_search_tries_values_of_its_own(tmp_path: Path, sampler: str) -> None:
    """The same seed the same ones, and none twice when the search goes on."""
    tried = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        for n_trials in (3, 6):
            sweep = search_in(
                tmp_path / name, *SPACE, n_trials=n_trials, seed=seed, sampler=sampler
            )
        tried.append([job.overrides[0] for job in sweep.jobs])
    assert tried[0] == tried[1] and len(set(tried[0])) == 6
    assert not set(tried[0]) & set(tried[2])


def test_a_run_whose_result_names_no_score_is_no_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can tell whether its score is good or bad."""
    with pytest.raises(RunError, match="no trial came to an end"):
        search_in(tmp_path, *SPACE, name=None)
    assert "does not say what its score is: the trial is not counted" in caplog.text


def test_the_objective_of_a_recalled_run_is_its_validation_score(tmp_path: Path) -> None:
    """By the test score, a search would choose by what is to judge its choice."""
    (tmp_path / "config.yaml").write_text("seed: 1\ntrainer:\n  steps: 8\n")
    (tmp_path / "status.json").write_text('{"status": "completed"}')
    steps = [0.1, 0.95, 0.9]
    test = {
        "score": "accuracy", "accuracy": 0.9, "accuracy_per_inner_step": steps, "ci95": 0.01,
        "episodes": 9, "inner_steps": 2, "algo": "maml", "data": "glyphs", "way": 5, "shot": 1,
        "query": 5, "seed": 1, "batch_norm": "none", "loss_per_inner_step": steps,
    }  # fmt: skip
    result = {
        "test": test, "best": {"step": 4, "score": 0.6, "ci95": 0.02}, "steps": 8,
        "skipped_steps": 0, "train_seconds": 1.0, "test_seconds": 1.0, "device": "CPU",
        "ranks": 1, "peak_memory_gib": 1.0,
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    job = Job([], tmp_path, {"seed": 1, "trainer": {"steps": 8}})
    for outcome in (_recalled(job), _left_behind(job, "the launcher gave up")):
        assert outcome is not None and outcome.score == 0.6


def test_an_interval_without_a_search_names_the_searcher() -> None:
    Plugins.instance()  # runs every plugin's module again, if nothing has asked for it before
    sweeper = import_module("hydra_plugins.metarun").GridSweeper(max_batch_size=None)
    sweeper.config = sweeper.launcher = cast(Any, object())

    class Context:
        config_loader = None

    sweeper.hydra_context = cast(Any, Context)
    with pytest.raises(ConfigError, match="hydra/sweeper=optuna"):
        sweeper.sweep(list(SPACE))
