"""What is read of a row's runs, and when there is no verdict."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metarun.config.compose import composed, register_schemas
from metarun.episodes.identity import identity_of
from metarun.reproduction import measured
from metarun.reproduction.measured import read_measured
from metarun.reproduction.page import as_json, line, page
from metarun.reproduction.results import Result, result_of
from metarun.reproduction.rows import CPU, FULL, Published, Row, experiment, rows
from metarun.system.files import write_json
from metarun.system.untrusted import UntrustedError
from metarun.training.setup import build
from tests.reporting.test_report import make

__all__ = ["make"]

Make = Callable[..., Path]
ROW = Row(
    "demo", "MAML", "glyphs", "Glyphs", "5w1s", "accuracy",
    Published("accuracy", 0.9, 0.005, "95 %, 600 tasks", "A et al. 2017, table 1"),
    ("glyphs are drawn, not written",), (FULL,), {}, {},
)  # fmt: skip
"""As if `experiment=demo` had a published figure."""


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is one of the list."""
    monkeypatch.setattr(measured, "rows", lambda: rows() | {"demo": ROW})


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """What `make` writes: the config of the row."""
    register_schemas()
    return asdict(composed("train", ["experiment=demo"]))


def test_a_row_that_was_not_run_says_so(tmp_path: Path) -> None:
    result = result_of(tmp_path, ROW, FULL)
    assert (result.measured, result.verdict, result.state) == (None, None, "not run")
    assert line(result) == (
        "demo: published 90.00 ± 0.50 % (A et al. 2017, table 1, 95 %, 600 tasks); not run"
    )


def test_the_verdict_is_of_all_completed_seeds(make: Make, tmp_path: Path) -> None:
    for seed, value in enumerate((0.90, 0.92, 0.91)):
        make(f"demo/s{seed}", seed=seed, value=value)
    make("demo/s3", seed=3, status="failed", error="the disk is full")
    result = result_of(tmp_path, ROW, FULL)
    assert result.measured is not None and result.verdict is not None
    assert (result.verdict.place, result.measured.ci95_over) == ("above", "3 seeds")
    assert result.verdict.difference == pytest.approx(0.01)
    assert "ours 91.00 ± 2.48 % (3 seeds)" in line(result)
    assert line(result).endswith("s3 failed at 2000/300: the disk is full")


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"trainer.steps": 30}, ("trainer.steps=30",)),
        ({"inner_opt.lr": 0.1, "backbone.width": 8}, ("backbone.width=8", "inner_opt.lr=0.1")),
        ({"engine.compile": "none", "trainer.log_every": 7, "trainer.wandb": "offline"}, ()),
    ],
)
def test_runs_with_other_settings_have_no_verdict(
    make: Make, tmp_path: Path, settings: dict[str, Any], changed: tuple[str, ...]
) -> None:
    """But how a run is computed, and what is written down of it, is free."""
    make("demo/s0", settings=settings)
    result = result_of(tmp_path, ROW, FULL)
    assert result.changed == changed
    assert (result.verdict is None) == bool(changed)
    if changed:
        assert f"no verdict: run with {', '.join(changed)}" in line(result)


def test_a_damaged_run_is_named(make: Make, tmp_path: Path) -> None:
    (make("demo/s0") / "result.json").write_text("{")
    result = result_of(tmp_path, ROW, FULL)
    assert result.measured is None and result.state.startswith("s0 unreadable: ")
    assert line(result).endswith(result.state)


def test_a_smaller_budget_says_so_in_every_line(make: Make, tmp_path: Path) -> None:
    row = rows()["maml_omniglot_5w1s"]
    own = asdict(composed("train", [f"experiment={experiment(row, CPU)}"]))
    folder = make("cpu/maml_omniglot_5w1s/s0", value=0.97)
    (folder / "config.yaml").write_text(yaml.safe_dump(own))
    result = result_of(tmp_path, row, CPU)
    assert result.verdict is not None and result.verdict.place == "below"
    steps = own["trainer"]["steps"]
    assert f"trainer.steps={steps} in place of 60000" in result.reduced
    assert not any("log_every" in text or "checkpoint_every" in text for text in result.reduced)
    whole = result_of(tmp_path, row, FULL)
    assert line(result).startswith("maml_omniglot_5w1s budget=cpu: published 98.70 ± 0.40 %")
    assert f"trainer.steps={steps} in place of 60000" in line(result)
    elsewhere = result_of(tmp_path, rows()["maml_cifar_fs_5w1s"], FULL)
    text = page([elsewhere, whole, result])
    assert "\n1 of 2 rows have a figure of ours.\n" in text
    assert text.index("## Omniglot") < text.index("## CIFAR-FS"), "what was run comes first"
    assert text.count("budget=cpu") > 1 and "not run" in text and "## Omniglot" in text
    for shown in (text, page([result])):  # beside the whole row, and alone as in a page of ours
        for said in row.differences:
            assert f"- {said} (maml_omniglot_5w1s)" in shown
    # What a run was given otherwise than the budget says is said once, by its own value.
    own["trainer"]["steps"] = 4
    (folder / "config.yaml").write_text(yaml.safe_dump(own))
    other = result_of(tmp_path, row, CPU)
    assert "trainer.steps=4" in other.changed and other.reduced
    assert "trainer.steps=4" in line(other) and f"trainer.steps={steps}" not in line(other)


def test_a_figure_of_an_ensemble_is_compared_with_one(make: Make, tmp_path: Path) -> None:
    row = replace(ROW, settings={FULL: {"trainer": {"ensemble": 5}}})
    folder = make("demo/s0", value=0.5)
    assert result_of(tmp_path, row, FULL).state == (
        "s0 unreadable: result.json has no figures of an ensemble"
    )
    result = json.loads((folder / "result.json").read_text())
    result["ensemble"] = result["test"] | {"accuracy": 0.901, "ci95": 0.002}
    (folder / "result.json").write_text(json.dumps(result))
    found = result_of(tmp_path, row, FULL)
    assert found.verdict is not None and found.verdict.place == "inside"
    assert "ours 90.10 ± 0.20 % (600 tasks of 1 seed, 5 checkpoints together)" in line(found)


def entry_of(result: Result, path: Path) -> dict[str, Any]:
    """A result as it stands in results.json, which is written."""
    (entry,) = as_json([result])
    write_json(path, [entry])
    found: dict[str, Any] = json.loads(path.read_text())[0]
    return found


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_figure_from_elsewhere_stands_as_one_from_here(
    make: Make, tmp_path: Path, seeds: int
) -> None:
    for seed in range(seeds):
        make(f"demo/s{seed}", seed=seed, value=0.9 + 0.01 * seed)
    here = result_of(tmp_path, ROW, FULL)
    entry_of(here, tmp_path / "results.json")
    known = read_measured(tmp_path / "results.json")
    there = result_of(tmp_path / "nothing", ROW, FULL, known)
    assert there == here
    assert page([there]) == page([here]) and as_json([there]) == as_json([here])
    for seed in range(seeds):
        make(f"more/demo/s{seed}", seed=seed, value=0.5)
    newer = result_of(tmp_path / "more", ROW, FULL, known)  # runs that are here count
    assert newer.measured is not None and newer.measured.value == 0.5


@pytest.mark.parametrize(
    "why", ["fewer seeds", "some are not complete", "run with trainer.steps=30"]
)
def test_less_than_a_figure_from_elsewhere_does_not_take_its_place(
    make: Make, tmp_path: Path, why: str
) -> None:
    for seed in range(2):
        make(f"demo/s{seed}", seed=seed)
    there = result_of(tmp_path, ROW, FULL)
    entry_of(there, tmp_path / "results.json")
    known = read_measured(tmp_path / "results.json")
    settings = {"trainer.steps": 30} if "steps" in why else {}
    make("here/demo/s0", value=0.5, settings=settings)
    if "complete" in why:
        make("here/demo/s1", seed=1, status="failed", error="the disk is full")
    result = result_of(tmp_path / "here", ROW, FULL, known)
    assert result.measured == there.measured and result.verdict == there.verdict
    assert result.state.endswith(f"runs that are here do not count: {why}")


def test_a_row_run_on_other_data_has_no_verdict(make: Make, tmp_path: Path) -> None:
    """As with files of another data set in the folder that data.root names."""
    row = replace(ROW, contents=("sha256:07692e0080da",))
    folder = make("demo/s0")
    path = folder / "result.json"
    found = json.loads(path.read_text())
    for digest, changed in (("07692e0080da" + "0" * 52, ()), ("f" * 64, ("f" * 12,))):
        found["test"]["data_identity"] = f"sha256:{digest}"
        path.write_text(json.dumps(found))
        result = result_of(tmp_path, row, FULL)
        assert result.changed == tuple(f"other data (sha256:{name})" for name in changed)
        assert (result.verdict is None) == bool(changed)
    entry = entry_of(result, tmp_path / "results.json")
    there = result_of(tmp_path / "nothing", row, FULL, read_measured(tmp_path / "results.json"))
    assert there.changed == result.changed and "no verdict: run with other data" in line(there)
    del entry["contents"]  # as of before they were written down
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    known = read_measured(tmp_path / "results.json")
    assert result_of(tmp_path / "nothing", row, FULL, known).verdict is not None


@pytest.mark.parametrize("name", ["maml_omniglot_5w1s", "protonet_omniglot_5w1s"])
def test_the_data_of_omniglots_rows_are_all_its_characters(real_data: Path, name: str) -> None:
    register_schemas()
    settings = [f"experiment={name}", f"data.root={real_data}"]
    content = identity_of(build(composed("train", settings), torch.device("cpu")).source)
    assert content[:19] in rows()[name].contents


def test_a_copy_of_a_run_is_no_other_seed(make: Make, tmp_path: Path) -> None:
    make("demo/s0")
    make("demo/s0_backup")
    make("demo/s1")  # seed 0 as well
    result = result_of(tmp_path, ROW, FULL)
    assert result.measured is not None and result.measured.seeds == (0,)
    assert result.state == "s1 unreadable: it is a run with seed=0"


def test_settings_that_were_switched_off_are_others(make: Make, tmp_path: Path) -> None:
    """What a config does not have is not left out of the comparison."""
    row = rows()["protonet_omniglot_5w5s"]
    own = asdict(composed("train", [f"experiment={row.name}", "task.train.way=null"]))
    folder = make(f"{row.name}/s0", value=0.997)
    (folder / "config.yaml").write_text(yaml.safe_dump(own))
    result = result_of(tmp_path, row, FULL)
    assert result.changed == ("task.train.way=null",) and result.verdict is None
    entry = entry_of(result, tmp_path / "results.json")
    del entry["settings"]["task.shot"]
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    known = read_measured(tmp_path / "results.json")
    assert "task.shot=null" in result_of(tmp_path / "nothing", row, FULL, known).changed


def test_an_entry_that_is_there_twice_is_refused(make: Make, tmp_path: Path) -> None:
    make("demo/s0")
    entry = entry_of(result_of(tmp_path, ROW, FULL), tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(UntrustedError, match="entry 2: demo is there twice"):
        read_measured(tmp_path / "results.json")


def test_a_run_that_failed_here_does_not_hide_a_figure_from_elsewhere(
    make: Make, tmp_path: Path
) -> None:
    make("demo/s0")
    entry_of(result_of(tmp_path, ROW, FULL), tmp_path / "results.json")
    known = read_measured(tmp_path / "results.json")
    make("other/demo/s0", status="failed", error="the disk is full")
    result = result_of(tmp_path / "other", ROW, FULL, known)
    assert result.measured is not None and result.state.startswith("s0 failed")


def test_a_figure_from_elsewhere_of_another_protocol_has_no_verdict(
    make: Make, tmp_path: Path
) -> None:
    """As of a row whose constants were changed since; also if only one of its runs was other."""
    make("demo/s0")
    make("demo/s1", seed=1, settings={"inner_opt.lr": 0.1})
    entry_of(result_of(tmp_path, ROW, FULL), tmp_path / "results.json")
    known = read_measured(tmp_path / "results.json")
    result = result_of(tmp_path / "nothing", ROW, FULL, known)
    assert result.changed == ("inner_opt.lr=0.1",) and result.verdict is None
    assert "no verdict: run with inner_opt.lr=0.1" in line(result)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": None}, "results.json, entry 1: None is no finite number"),
        ({"seeds": ["0"]}, "entry 1: ['0'] is no list of int"),
        ({"settings": {}}, "entry 1: settings are no mapping with trainer.steps"),
        ({"device": ...}, "entry 1: 'device' is missing"),
        ({"value": 50.0}, "entry 1: value is 50"),
        ({"ci95": -0.1}, "entry 1: ci95 is -0.1"),
        ({"train_seconds": -5}, "entry 1: train_seconds is -5"),
        ({"seeds": []}, "entry 1: seeds are empty"),
        ({"seeds": [True]}, "entry 1: [True] is no list of int"),
        ({"task_sets": "tasks"}, "is no list"),
        ({"device": 3}, "entry 1: 3 is no text"),
        ({"score": "mse"}, "entry 1: score is 'mse', and that of demo is 'accuracy'"),
        ({"settings": {"trainer.steps": True}}, "no mapping with trainer.steps"),
        ({"row": "demo_2"}, "entry 1: there is no row 'demo_2' with such a budget"),
        ({"budget": "cpu"}, "entry 1: there is no row 'demo' with such a budget"),
        ({"row": ...}, "entry 1: 'row' is missing"),
        (None, "results.json is damaged"),
    ],
)
def test_a_file_of_figures_that_is_damaged_is_refused(
    make: Make, tmp_path: Path, change: dict[str, Any] | None, said: str
) -> None:
    make("demo/s0")
    path = tmp_path / "results.json"
    entry = entry_of(result_of(tmp_path, ROW, FULL), path) | (change or {})
    kept = {key: value for key, value in entry.items() if value is not ...}
    path.write_text(json.dumps([kept]) if change else "{}")
    with pytest.raises(UntrustedError) as raised:
        read_measured(path)
    assert said in str(raised.value)
