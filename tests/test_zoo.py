"""The table of all methods: its plan, its rows, and a small run of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from metarun.config.catalogue import components
from metarun.errors import ConfigError
from metarun.rundir.interval import half_width95
from scripts import zoo
from tests.forking import Forks

START, END = zoo.marks("zoo")
OPTIONS = zoo.Options(6, 600, 100, 64, "glyphs", "replay")


@pytest.mark.parametrize(
    ("budget", "each", "steps"),
    [
        (360, 0.1, 3600),
        (360, 0.0347, 10002),  # 10,375 is rounded to 10,000, and that to a multiple of 6
        (360, 0.31, 1200),
        (360, 8.0, 48),  # of 45
        (1.2, 0.02, 60),
        (1, 5.0, 6),  # no fewer than validations
    ],
)
def test_the_meta_steps_of_a_budget(budget: float, each: float, steps: int) -> None:
    assert zoo.steps_for(budget, each) == steps


def test_every_classification_method_has_a_row_and_no_other() -> None:
    kinds = {name: zoo.kind_of(name) for name in components("algo")}
    assert {name for name, kind in kinds.items() if kind.classifies} == zoo.METHODS.keys()
    assert {n for n, kind in kinds.items() if not kind.learns} == {"nearest_neighbour", "scratch"}
    assert all(row.learns and row.adapts for row in zoo.METHODS.values())


def test_a_method_that_is_for_regression_alone_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def built(name: str, *settings: str) -> Any:
        if "data=glyphs" in settings:
            raise ConfigError("no classes")

    monkeypatch.setattr(zoo, "_built", built)
    assert not zoo.kind_of("maml").classifies


@pytest.mark.parametrize("setting", zoo.TASKS)
def test_the_settings_of_every_method_are_settings_of_metarun(setting: str) -> None:
    zoo.register_schemas()
    for method in zoo.METHODS:
        config = zoo.composed("train", zoo.settings_of(setting, method, OPTIONS, 600))
        assert config.algo.name == method
        assert (config.trainer.steps, config.trainer.eval_every) == (600, 100)
    assert config.task.way == int(setting.partition("w")[0])
    of_600 = zoo.settings_of("5w1s", "maml_pp", OPTIONS, 600)
    assert "algo.multi_step_loss=60" in of_600


def test_a_plan_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    plan = zoo.Plan(tmp_path / "plan.json", OPTIONS)
    assert plan.steps("5w1s", "maml") is None
    plan.put("5w1s", "maml", 0.1)
    again = zoo.Plan(tmp_path / "plan.json", OPTIONS)
    assert again.steps("5w1s", "maml") == 3600
    assert again.step_seconds("5w1s") == {"maml": 0.1}
    assert again.steps("20w5s", "maml") is None
    again.put("20w5s", "maml", 1.0)
    assert zoo.Plan(tmp_path / "plan.json", OPTIONS).steps("5w1s", "maml") == 3600
    with pytest.raises(ConfigError, match=r"minutes 6 and not 3"):
        zoo.Plan(tmp_path / "plan.json", replace(OPTIONS, minutes=3))


def made_up(folder: Path, algo: str, seed: int, test: float, validation: float) -> Path:
    """A finished run of 6 meta-steps, of 2 tasks each, at 4 tasks a second."""
    directory = folder / algo / f"s{seed}"
    directory.mkdir(parents=True)
    config = {
        "seed": seed,
        **{g: {"name": "some"} for g in ("backbone", "inner_opt", "outer_opt")},
        "algo": {"name": algo},
        "data": {"name": "glyphs"},
        "task": {"way": 5, "shot": 1, "query": 5},
        "trainer": {"steps": 6, "meta_batch": 2},
    }
    result = {
        "test": {
            "score": "accuracy", "accuracy": test, "ci95": 0.01, "episodes": 50,
            "accuracy_per_inner_step": [test], "loss_per_inner_step": [1.0],
        },
        "best": {"score": validation, "step": 6},
        "steps": 6, "train_seconds": 9.0, "test_seconds": 2.0, "device": "CPU",
        "peak_memory_gib": 0.5,
    }  # fmt: skip
    log = [
        {"step": 4, "time/tasks_per_s": 4.0, "time/elapsed_s": 2.0},
        {"step": 4, "val/accuracy": 0.5, "time/elapsed_s": 7.0},
        {"step": 6, "time/tasks_per_s": 4.0, "time/elapsed_s": 9.0},
    ]
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "status.json").write_text('{"status": "completed"}')
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    return directory


def test_rows_are_ordered_by_validation_with_intervals_over_seeds(tmp_path: Path) -> None:
    runs = [
        made_up(tmp_path, "maml", 0, 0.90, 0.70),
        made_up(tmp_path, "maml", 1, 0.92, 0.72),
        made_up(tmp_path, "protonet", 0, 0.80, 0.75),
        made_up(tmp_path, "protonet", 1, 0.84, 0.75),
    ]
    slow = json.loads((runs[3] / "result.json").read_text()) | {"test_seconds": 9.0}
    (runs[3] / "result.json").write_text(json.dumps(slow))  # while others used the machine
    rows = zoo.rows_of(runs, {"maml": 0.4, "protonet": 0.5})
    assert [row.method for row in rows] == ["protonet", "maml"]  # whatever the tests say
    first, second = rows
    assert first.group.value == pytest.approx(0.82)
    assert first.group.ci95 == pytest.approx(half_width95(0.02 * 2**0.5, 2))
    assert second.group.validation == pytest.approx(0.71)
    assert (first.steps, first.step_seconds, first.test_seconds) == (6, 0.5, 0.04)
    header, _, line, _ = zoo.table(rows)
    assert "test accuracy (95 % CI over 2 seeds)" in header
    assert line == (
        "| protonet | an embedding | class means | 6 | 0.5 s | 82.00 ± 25.41 % | 75.00 % | 0.04 s |"
    )
    kept = zoo.as_json({"5w1s": rows}, OPTIONS)["settings"]["5w1s"]
    assert [(r["method"], len(r["runs"])) for r in kept] == [("protonet", 2), ("maml", 2)]


def test_with_one_seed_the_interval_is_over_its_tasks(tmp_path: Path) -> None:
    rows = zoo.rows_of([made_up(tmp_path, "maml", 0, 0.9, 0.7)], {})
    header, _, line = zoo.table(rows)
    assert "over 50 tasks of 1 seed" in header
    assert "90.00 ± 1.00 %" in line


def test_a_block_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{START}\nold\n{END}\n\nafter\n")
    for _ in range(2):
        zoo.put_into(page, "| new |\n")
        assert page.read_text() == f"# Title\n\n{START}\n| new |\n{END}\n\nafter\n"
    page.write_text(f"{START}\n{END}\n<!-- other -->\n<!-- /other -->\n")
    zoo.put_into(page, "| new |\n", "other")
    assert page.read_text() == f"{START}\n{END}\n<!-- other -->\n| new |\n<!-- /other -->\n"


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        START,
        END,
        f"{END}\n{START}",
        f"{START}\n{END}\n{START}\n{END}",
    ],
)
def test_a_page_without_a_block_stays_as_it_is(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ConfigError, match="needs one line"):
        zoo.put_into(page, "new")
    assert page.read_text() == text


def test_a_small_run_and_the_same_command_again(
    environment: dict[str, str],
    tmp_path: Path,
    forks: Forks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"{START}\n{END}\n")
    command = [
        "--data", "glyphs", "--minutes", "0.02", "--seeds", "1", "--width", "4", "--episodes", "5",
        "--val-episodes", "5", "--settings", "5w1s", "--out", str(out), "--methods",
        "protonet,nearest_neighbour", "--markdown-into", str(page),
    ]  # fmt: skip
    monkeypatch.setattr(zoo, "Popen", forks.popen)
    monkeypatch.setenv("METARUN_CACHE", environment["METARUN_CACHE"])
    assert zoo.main(command) == 0, capsys.readouterr()
    found = json.loads((out / "zoo.json").read_text())
    rows = {row["method"]: row for row in found["settings"]["5w1s"]}
    plan = json.loads((out / "plan.json").read_text())["runs"]["5w1s/protonet"]
    assert rows["protonet"]["meta_steps"] == plan["steps"] >= zoo.VALIDATIONS
    assert rows["nearest_neighbour"]["meta_steps"] == 0
    assert "| protonet |" in page.read_text() and "| protonet |" in (out / "zoo.md").read_text()

    # Again, with one run that is lost and one that fails: the plan stays, the others do not suffer.
    shutil.rmtree(out / "5w1s" / "nearest_neighbour")
    (out / "5w1s" / "nearest_neighbour").mkdir()
    (out / "5w1s" / "nearest_neighbour" / "s0").write_text("no directory")
    assert zoo.main(command) == 1
    told = capsys.readouterr().out
    assert "5w1s/protonet/s0: recalled" in told
    assert "FAILED 5w1s/nearest_neighbour/s0: " in told
    assert json.loads((out / "plan.json").read_text())["runs"]["5w1s/protonet"] == plan
    kept = json.loads((out / "zoo.json").read_text())
    assert [row["method"] for row in kept["settings"]["5w1s"]] == ["protonet"]
    assert len(kept["failed"]) == 1


def test_what_is_wrong_in_a_command_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (["--methods", "mamal"], ["--settings", "7w"], ["--minutes", "0"]):
        assert zoo.main([*wrong, "--out", str(tmp_path)]) == 2
        assert "zoo: --" in capsys.readouterr().err
