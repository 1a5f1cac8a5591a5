"""The search: what its directory may hold, and what becomes of its trials."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from metarun.errors import ConfigError, RunError
from metarun.job import Outcome
from metarun.search import JOURNAL, search
from metarun.sweep import Job, Sweep

SETTINGS = {"n_trials": 2, "n_jobs": 1, "sampler": "random", "seed": 0}
SPACE = ("inner_opt.lr=interval(0.01,0.1)",)


class FakeSweep:
    """Runs nothing: `score` is what becomes of a run, by its overrides; None: it is refused."""

    def __init__(self, directory: Path, score: Callable[[list[str]], float | None]) -> None:
        self.directory, self.score = directory, score
        self.jobs: list[Job] = []
        self.launched: list[Job] = []

    def add(self, overrides: Sequence[str]) -> Job:
        run = self.directory / "-".join(overrides).replace("/", "-")
        job = Job(list(overrides), run, {})
        if self.score(job.overrides) is None:
            job.outcome = Outcome("failed", error="a wrong value")
        self.jobs.append(job)
        return job

    def refuse_if_nothing_can_start(self) -> None:
        seen = SimpleNamespace(jobs=dict(enumerate(self.jobs)), _launched=bool(self.launched))
        Sweep.refuse_if_nothing_can_start(cast(Any, seen))

    def launch(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.outcome is None:
                job.outcome = Outcome("completed", self.score(job.overrides))
                self.launched.append(job)

    def summarise(self) -> str:
        return ""


def search_in(
    directory: Path,
    *arguments: str,
    score: Callable[[list[str]], float | None] = lambda overrides: 5.0,
    **settings: Any,
) -> FakeSweep:
    sweep = FakeSweep(directory, score)
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


def test_an_interval_without_a_search_names_the_searcher() -> None:
    Plugins.instance()  # runs every plugin's module again, if nothing has asked for it before
    sweeper = import_module("hydra_plugins.metarun").GridSweeper(max_batch_size=None)
    sweeper.config = sweeper.launcher = cast(Any, object())

    class Context:
        config_loader = None

    sweeper.hydra_context = cast(Any, Context)
    with pytest.raises(ConfigError, match="hydra/sweeper=optuna"):
        sweeper.sweep(list(SPACE))
