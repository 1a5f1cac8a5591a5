"""`metarun reproduce`: rows are listed, run as a sweep, and compared."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metarun.cli.reproduce import parse
from metarun.errors import ConfigError
from metarun.reproduction.page import MARK
from metarun.reproduction.rows import rows
from tests.conftest import Metarun

SMALL = ("trainer.steps=2", "trainer.eval_episodes=2", "trainer.test_episodes=3")


def test_the_list_has_every_row_with_its_budgets(metarun: Metarun) -> None:
    lines = metarun("reproduce", "--list").stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [*rows()]
    assert all(line.endswith("; not run") for line in lines)
    (one,) = metarun("reproduce", "--list", "maml_omniglot_5w1s").stdout.splitlines()
    assert one == (
        "maml_omniglot_5w1s (full, cpu): published 98.70 ± 0.40 % (Finn et al. 2017, table 1, "
        "95 %, 600 tasks); not run"
    )


def test_rows_run_are_recalled_and_stand_in_the_tables(metarun: Metarun, tmp_path: Path) -> None:
    (name, *_) = (name for name, row in rows().items() if row.data == "sinusoid")
    command = ("reproduce", name, "budget=cpu", "seed=0,1", "out=mine", *SMALL)
    said = metarun(*command).stdout
    assert "2 runs: 2 completed, 0 recalled" in said
    assert f"{name} budget=cpu: published" in said
    assert "no verdict: run with trainer.eval_episodes=2, trainer.steps=2" in said
    assert (tmp_path / "mine" / "cpu" / name / "s1" / "result.json").exists()
    page = (tmp_path / "mine" / "results.md").read_text()
    assert page.startswith(MARK) and all(row in page.replace("\\", "") for row in rows())
    found = {
        (e["row"], e["budget"]): e for e in json.loads((tmp_path / "mine/results.json").read_text())
    }
    assert found[name, "cpu"]["seeds"] == [0, 1] and found[name, "cpu"]["verdict"] is None
    one, other = found[name, "cpu"]["task_sets"]
    assert one.startswith("tasks:") and one != other, "seeds have tasks of their own"
    assert found["maml_omniglot_5w1s", "full"]["state"] == "not run"
    assert "2 runs: 0 completed, 2 recalled" in metarun(*command).stdout
    (tmp_path / "notes.md").write_text("by hand")
    error = metarun("reproduce", "--table", "out=mine", "page=notes.md", code=2).stderr
    assert "notes.md was not written by metarun reproduce: choose another name" in error
    metarun("reproduce", "--table", "out=mine", "page=docs/results.md")
    assert (tmp_path / "docs" / "results.md").read_text() == page
    # Another machine, which has run nothing, keeps what stands on the page.
    metarun("reproduce", "--table", "out=other", "page=docs/results.md")
    assert (tmp_path / "docs" / "results.md").read_text() == page
    said = metarun("reproduce", "--list", name, "out=other", "page=docs/results.md").stdout
    assert f"{name} budget=cpu: published" in said and "no verdict: run with" in said
    (tmp_path / "docs" / "results.json").write_text("[{}]")
    error = metarun("reproduce", "--table", "page=docs/results.md", code=2).stderr
    assert "page=docs/results.md: results.json, entry 1: 'row' is missing" in error


def test_a_page_that_would_lose_figures_is_refused_before_training(
    metarun: Metarun, tmp_path: Path
) -> None:
    for name in ("alone", "other"):
        (tmp_path / f"{name}.md").write_text(f"{MARK}\n")
    (tmp_path / "other.json").write_text("{")
    (tmp_path / "notes.md").write_text("by hand")
    (tmp_path / "notes.json").write_text("[]")
    for page, said in (
        ("alone.md", "its figures are not beside it, in alone.json"),
        ("other.md", "other.json is damaged"),
        ("notes.md", "was not written by metarun reproduce"),
    ):
        done = metarun("reproduce", "maml_sinusoid_k5", "budget=cpu", f"page={page}", code=2)
        assert said in done.stderr and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_first(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """As of `metarun train -m`, which does the work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "metarun", "reproduce", "maml_sinusoid_k5", "budget=cpu", "out=o",
         "trainer.eval_episodes=2", "trainer.test_episodes=2", "engine.compile=none"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                break
        process.send_signal(number)
        told = process.stderr.read()
    assert process.returncode == 130
    status = json.loads((tmp_path / "o/cpu/maml_sinusoid_k5/s0/status.json").read_text())
    assert status["status"] == "interrupted" and "after meta-step" in told


def test_a_row_that_fails_is_told(metarun: Metarun, tmp_path: Path) -> None:
    """Here for lack of its files."""
    done = metarun(
        "reproduce", "maml_mini_imagenet_5w1s", f"data.root={tmp_path}", "device=cpu", code=1
    )  # fmt: skip
    assert "not all rows were run: the sweep ended with exit code" in done.stderr
    assert "maml_mini_imagenet_5w1s: published 48.70 ± 1.84 %" in done.stdout


def test_the_list_of_a_budget_has_its_rows_alone(metarun: Metarun) -> None:
    lines = metarun("reproduce", "--list", "budget=cpu").stdout.splitlines()
    assert len(lines) == sum("cpu" in row.budgets for row in rows().values()) < len(rows())
    assert all(" (cpu): published" in line for line in lines)


def test_a_wrong_setting_is_an_error_of_use(metarun: Metarun) -> None:
    """With the exit code of `metarun train`, which says what is wrong."""
    error = metarun("reproduce", "maml_sinusoid_k5", "trainer.steps=0", code=2).stderr
    assert "trainer.steps=0: must be from 1" in error and "another out=DIR" in error


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "not given: which rows to run"),
        (["maml_omniglot_5w2s"], "there is no row 'maml_omniglot_5w2s' (did you mean"),
        (["maml_omniglot_*", "budgt=cpu"], "no setting 'budgt' (did you mean budget?)"),
        (["maml_omniglot_*", "budget=gpu"], "budget=gpu: choose full or cpu"),
        (["metaoptnet_mini_imagenet_5w1s", "budget=cpu"], "has no such budget"),
        (["maml_omniglot_5w1s", "experiment=demo"], "rows are named without a key"),
        (["--list", "trainer.steps=3"], "trainer.steps=3: --list trains nothing; leave it out"),
        (["--list", "seed=1"], "seed=1: --list trains nothing; leave it out"),
        (["--table", "budget=cpu"], "budget=cpu: --table trains nothing; leave it out"),
        (["--table", "maml_*"], "maml_*: --table trains nothing; leave it out"),
        (["--list", "--table"], "give one of them"),
        (["--all"], "there is no option '--all'"),
        (["maml_omniglot_5w1s", "out="], "out= is empty"),
        (["--table", "page=results.json"], "page=results.json: its name must end with .md"),
    ],
)
def test_mistakes_are_named(arguments: list[str], error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(arguments)
    assert error in str(raised.value)
