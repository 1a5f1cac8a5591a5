"""What a report says of made-up runs with known scores, in a known order."""

import csv
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib.axes
import pytest
import yaml
from scipy import stats

from metarun.config.run import NEUTRAL_KEYS, flat
from metarun.episodes.identity import SAMPLED
from metarun.reporting.content import report_on
from metarun.reporting.gather import gather
from metarun.reporting.groups import LOGGED, Board, boards
from metarun.reporting.labels import unique
from metarun.reporting.plots import best_by_optimizer, plots
from metarun.reporting.table import board_table, groups_csv, runs_csv
from metarun.reporting.text import markdown, terminal
from tests.setups import config_of

Make = Callable[..., Path]
BASES = {
    "accuracy": ["data=omniglot", "data.root=/data"],
    "mse": ["data=sinusoid", "backbone=mlp"],
}
SPLITTING = {
    "algo.name": "anil",
    "data.name": "other",
    "backbone.name": "other",
    "inner_opt.name": "other",
    "outer_opt.name": "other",
}
"""Other values of settings that are names."""


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    return {score: asdict(config_of(*given)) for score, given in BASES.items()}


@pytest.fixture
def make(tmp_path: Path, configs: dict[str, dict[str, Any]]) -> Make:
    """Write the directory of a run as metarun leaves it."""

    def run(
        name: str,
        *,
        score: str = "accuracy",
        value: float | None = 0.5,
        validation: float | None = 0.6,
        seed: int = 0,
        status: str = "completed",
        settings: dict[str, Any] | None = None,
        curve: Sequence[float] = (),
        speeds: Sequence[float] = (),
        **figures: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = json.loads(json.dumps(configs[score])) | {"seed": seed}
        for key, setting in (settings or {}).items():
            *groups, leaf = key.split(".")
            part = config
            for group in groups:
                part = part[group]
            part[leaf] = setting
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "status.json").write_text(json.dumps({"status": status}))
        log: list[dict[str, Any]] = []
        for i, own in enumerate(curve, start=1):
            log.append({"step": 100 * i, f"val/{score}": own, "time/elapsed_s": 3.0 * i})
        for i, speed in enumerate(speeds, start=1):
            log.append({"step": 100 * i, "time/tasks_per_s": speed})
        text = "".join(json.dumps(entry) + "\n" for entry in log)
        (folder / "metrics.jsonl").write_text(text)
        test = {
            "score": score, score: value, "ci95": 0.01, "episodes": 600,
            f"{score}_per_inner_step": [0.2, 0.9, value],
            "loss_per_inner_step": [1.6, 0.5, 0.3], "seed": seed, "inner_steps": 2,
            "data_identity": figures.pop("data_identity", None),
        }  # fmt: skip
        result = {
            "test": test, "best": {"step": 100, "score": validation, "ci95": 0.01},
            "steps": config["trainer"]["steps"], "train_seconds": 200.0,
            "peak_memory_gib": 1.5, "device": "CPU (1 thread)",
        }  # fmt: skip
        for key, figure in figures.items():
            (test if key in test else result)[key] = figure
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return run


def compared(*roots: Path) -> tuple[list[Board], list[str]]:
    return boards(gather(roots).runs)


def lines_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def t_interval(values: Sequence[float]) -> float:
    """Half-width over seeds, by scipy."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


@pytest.mark.parametrize(("score", "sign"), [("accuracy", 1), ("mse", -1)])
def test_the_order_is_that_of_validation_and_never_of_the_test(
    make: Make, tmp_path: Path, score: str, sign: int
) -> None:
    """The test says the opposite of validation, and the learning rates something else."""
    shuffled = random.Random(0).sample(range(10), 10)
    for rank in shuffled:  # the best is 0
        make(
            f"runs/{shuffled.index(rank)}", score=score, validation=0.5 - sign * 0.03 * rank,
            value=0.5 + sign * 0.03 * rank, settings={"inner_opt.lr": 0.1 + (7 * rank) % 10},
        )  # fmt: skip
    expected = [0.1 + (7 * rank) % 10 for rank in range(10)]
    (board,), _ = compared(tmp_path / "runs")
    assert [group.settings["inner_opt.lr"] for group in board.groups] == expected
    header, rows = board_table(board)
    assert [row[header.index("lr")].value for row in rows] == expected
    csv_order = [float(line["inner_opt.lr"]) for line in lines_of(groups_csv([board]))]
    assert csv_order == pytest.approx(expected)
    report, _ = report_on([tmp_path / "runs"])
    for text in (terminal(report), markdown(report)):
        best = [f"{100 * (0.5 + sign * 0.03 * r):.2f} ±" for r in range(10)]
        if score == "mse":
            best = [f"{0.5 + sign * 0.03 * r:.4g} ±" for r in range(10)]
        places = [text.index(value) for value in best]
        assert places == sorted(places)


def test_groups_are_means_over_seeds_with_students_interval(make: Make, tmp_path: Path) -> None:
    chance = random.Random(1)
    groups: dict[float, list[dict[str, Any]]] = {}
    for lr, count in ((0.1, 2), (0.2, 3), (0.3, 7)):
        for seed in range(count):
            own: dict[str, Any] = {
                "value": chance.random(), "validation": chance.random(),
                "train_seconds": 500 * chance.random(), "peak_memory_gib": 9 * chance.random(),
                "speeds": [1000 * chance.random() for _ in range(5)],
            }  # fmt: skip
            groups.setdefault(lr, []).append(own)
            make(f"runs/{lr}-{seed}", seed=seed, settings={"inner_opt.lr": lr}, **own)
    (board,), notes = compared(tmp_path / "runs")
    assert not notes and len(board.groups) == 3
    header, rows = board_table(board)
    lines = {float(line["inner_opt.lr"]): line for line in lines_of(groups_csv([board]))}
    for group, row in zip(board.groups, rows, strict=True):
        runs = groups[group.settings["inner_opt.lr"]]
        values = [run["value"] for run in runs]
        batch = group.settings["trainer.meta_batch"]
        expected = {
            "value": fmean(values),
            "ci95": t_interval(values),
            "best_validation": fmean(run["validation"] for run in runs),
            "train_seconds": fmean(run["train_seconds"] for run in runs),
            "peak_memory_gib": max(run["peak_memory_gib"] for run in runs),
            "meta_steps_per_s": fmean(median(run["speeds"]) / batch for run in runs),
        }
        line = lines[group.settings["inner_opt.lr"]]
        assert {key: float(line[key]) for key in expected} == pytest.approx(expected, rel=1e-12)
        assert line["ci95_over"] == "seeds"
        assert line["seeds"] == " ".join(str(seed) for seed in range(len(runs)))
        cells = dict(zip(header, row, strict=True))
        value, ci95 = 100 * expected["value"], 100 * expected["ci95"]
        assert cells["test accuracy"].text == f"{value:.2f} ± {ci95:.2f} %"
        assert cells["95 % CI over"].text == f"{len(runs)} seeds"
        assert cells["best val accuracy"].text == f"{100 * expected['best_validation']:.2f} %"
        assert cells["peak memory"].text == f"{expected['peak_memory_gib']:.2f} GiB"
        assert cells["meta-steps/s"].value == pytest.approx(expected["meta_steps_per_s"])
        assert cells["training"].value == pytest.approx(expected["train_seconds"])


def test_one_seed_alone_has_the_interval_over_its_tasks(make: Make, tmp_path: Path) -> None:
    make("runs/a", value=0.7, ci95=0.0123, episodes=450)
    (board,), _ = compared(tmp_path / "runs")
    (group,) = board.groups
    assert (group.value, group.ci95, group.interval) == (0.7, 0.0123, "450 tasks of 1 seed")
    (line,) = lines_of(groups_csv([board]))
    assert (line["value"], line["ci95"], line["ci95_over"]) == ("0.7", "0.0123", "tasks")


def test_every_run_has_its_own_figures_in_its_line(make: Make, tmp_path: Path) -> None:
    for seed in range(3):
        make(
            f"runs/{seed}", seed=seed, value=0.1 * (seed + 1), validation=0.2 * (seed + 1),
            ci95=0.01 * (seed + 1), episodes=100 + seed, train_seconds=10.0 + seed,
            peak_memory_gib=1.0 + seed, device=f"CPU {seed}",
        )  # fmt: skip
    for line in lines_of(runs_csv(gather([tmp_path / "runs"]))):
        seed = int(Path(line["directory"]).name)
        assert int(line["seed"]) == seed and line["score"] == "accuracy"
        figures = [float(line[k]) for k in ("value", "ci95", "tasks", "best_validation")]
        assert figures == [0.1 * (seed + 1), 0.01 * (seed + 1), 100 + seed, 0.2 * (seed + 1)]
        costs = [float(line[k]) for k in ("train_seconds", "peak_memory_gib")]
        assert costs == [10.0 + seed, 1.0 + seed] and line["device"] == f"CPU {seed}"


def another(key: str, value: Any) -> Any:
    """A value of a setting that is not this one."""
    if key in SPLITTING:
        return SPLITTING[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, {"params": "head.*"}] if key.endswith(".groups") else [*value, "x"]
    return "other" if value is not None else 7


@pytest.mark.parametrize("score", BASES)
def test_every_setting_splits_groups_unless_it_is_neutral(
    make: Make, tmp_path: Path, configs: dict[str, dict[str, Any]], score: str
) -> None:
    """Whatever a user varies: no other runs in a mean, none left uncompared without need."""
    make("base/run", score=score)
    for key, value in flat(configs[score]).items():
        if key == "seed":
            continue
        make(f"{key}/run", score=score, seed=1, settings={key: another(key, value)})
        found, notes = compared(tmp_path / "base", tmp_path / key)
        sizes = sorted([[len(group.runs) for group in board.groups] for board in found])
        solved = key.startswith(("data.", "task.")) and not key.startswith("task.train.")
        if key in (*NEUTRAL_KEYS, *LOGGED):
            assert sizes == [[2]], f"{key} splits what belongs together"
            changed = {key: another(key, value), "inner_opt.lr": 0.9}
            make(f"{key}/other", score=score, settings=changed)
            (board,), _ = compared(tmp_path / "base", tmp_path / key)
            assert board.columns == ["inner_opt.lr"], f"{key} keeps apart what can be compared"
        elif solved:
            assert sizes == [[1], [1]], f"{key} is another task"
            assert len({board.title for board in found}) == 2, key
        else:
            assert sizes == [[1, 1]], f"{key} is not the same run"
            assert len({group.label for group in found[0].groups}) == 2, key
            assert found[0].columns == [key]
        assert not notes


def test_runs_of_the_same_data_in_different_folders_are_compared(
    make: Make, tmp_path: Path
) -> None:
    """Each learning rate in folders of its own; one of them in two."""
    for i, (lr, seed, folder) in enumerate(
        [(0.1, 0, "/scratch/a"), (0.1, 1, "/home/b"), (0.2, 0, "/home/c"), (0.3, 0, None)]
    ):
        own = {"data.root": folder, "data.download": i % 2 == 0, "inner_opt.lr": lr}
        make(f"runs/{i}", seed=seed, settings=own)
    (board,), _ = compared(tmp_path / "runs")
    assert [len(group.runs) for group in board.groups] == [2, 1, 1]
    assert board.columns == ["inner_opt.lr"]
    report, _ = report_on([tmp_path / "runs"])
    assert len(report.sections) == 1
    assert not any(folder in markdown(report) for folder in ("/scratch", "/home"))


def test_what_is_logged_and_saved_makes_no_difference(make: Make, tmp_path: Path) -> None:
    make("runs/a", seed=0)
    make("runs/b", seed=1, settings={"trainer.log_every": 7, "trainer.checkpoint_every": 3})
    (board,), _ = compared(tmp_path / "runs")
    assert [len(group.runs) for group in board.groups] == [2]


def test_runs_of_the_same_settings_on_other_data_are_kept_apart(make: Make, tmp_path: Path) -> None:
    """A folder's content may change between two runs; settings cannot tell."""
    ours, theirs = "sha256:0123456789abcdef0123", "sha256:fedcba98765432100123"
    make("runs/a", seed=0, value=0.9, data_identity=ours, settings={"data.root": "/a"})
    make("runs/b", seed=1, value=0.8, data_identity=ours, settings={"data.root": "/b"})
    make("runs/c", seed=2, value=0.3, data_identity=theirs, settings={"data.root": "/b"})
    make("runs/d", seed=3, value=0.1)
    found, _ = compared(tmp_path / "runs")
    assert [[run.seed for run in board.groups[0].runs] for board in found] == [[0, 1], [2], [3]]
    ends = ("content=sha256:0123456789ab", "content=sha256:fedcba987654", "content=not known")
    assert [board.title.endswith(end) for board, end in zip(found, ends, strict=True)] == [True] * 3


@pytest.mark.parametrize("known", [None, f"{SAMPLED}12/0.5/0.25"])
def test_runs_of_one_known_content_are_compared_with_those_that_do_not_tell_theirs(
    make: Make, tmp_path: Path, known: str | None
) -> None:
    """Runs of earlier versions, and identities that change with the seed."""
    make("runs/a", seed=0, data_identity="sha256:0123456789abcdef0123")
    make("runs/b", seed=1, data_identity=known)
    make("runs/c", seed=2, data_identity=known and known.replace("12/", "13/"))
    (board,), _ = compared(tmp_path / "runs")
    assert len(board.groups[0].runs) == 3 and "content" not in board.title


def test_no_two_boards_have_the_same_title_nor_two_groups_the_same_label(
    make: Make, tmp_path: Path
) -> None:
    """Settings that look alike as text, or that a title leaves out, included."""
    variants: list[dict[str, Any]] = [
        {}, {"task.way": 3}, {"task.way": 4}, {"task.shot": 7}, {"data.extra": 1},
        {"data.extra": "1"}, {"data.extra": None}, {"data.extra": "null"}, {"data.extra": [1]},
        {"data.extra": "[1]"},
    ]  # fmt: skip
    for i, own in enumerate(variants):
        make(f"tasks/{i}", score="mse", settings=own)
    found, _ = compared(tmp_path / "tasks")
    assert len({board.title for board in found}) == len(found) == len(variants)
    assert any(board.title.endswith("task.way=3") for board in found)
    for i, value in enumerate((1, "1", None, "null", "[1]", [1], "x" * 70 + "a", "x" * 70 + "b")):
        make(f"groups/{i}", score="mse", settings={"inner_opt.extra": value})
    (board,), _ = compared(tmp_path / "groups")
    assert len({group.label for group in board.groups}) == len(board.groups) == 8


def test_texts_that_are_alike_get_numbers() -> None:
    assert unique(["a", "b", "a", "a (2)", "a"]) == ["a", "b", "a (2)", "a (2) (2)", "a (3)"]
    assert unique([]) == []


def test_only_completed_runs_count(make: Make, tmp_path: Path) -> None:
    """A result may lie there from before: of an earlier attempt, or half of a copy."""
    make("runs/done", seed=0, value=0.5)
    make("runs/done1", seed=1, value=0.7)
    for i, status in enumerate(("failed", "interrupted", "running", "killed"), start=2):
        make(f"runs/{status}", seed=i, value=0.0, status=status)
    (make("runs/never", seed=9, value=0.0) / "status.json").unlink()
    (board,), _ = compared(tmp_path / "runs")
    (group,) = board.groups
    assert [run.seed for run in group.runs] == [0, 1] and group.value == pytest.approx(0.6)
    report, tables = report_on([tmp_path / "runs"])
    assert report.counts.startswith("7 runs: 2 completed")
    assert len(report.unfinished[1]) == 5
    values = {line["status"]: line["value"] for line in lines_of(tables["report_runs.csv"])}
    assert all(value == "" for status, value in values.items() if status != "completed")


def test_a_score_that_is_no_number_is_left_out_with_the_reason(make: Make, tmp_path: Path) -> None:
    make("runs/good", seed=0, value=0.5)
    make("runs/null", seed=1, value=None)
    make("runs/nan", seed=2, value=float("nan"))
    make("runs/validation", seed=3, validation=None)
    found = gather([tmp_path / "runs"])
    assert [run.seed for run in found.runs] == [0]
    assert {path.name for path, reason in found.skipped if "no finite figures" in reason} == {
        "null", "nan", "validation",
    }  # fmt: skip


def test_a_result_of_other_meta_steps_than_the_config_is_left_out(
    make: Make, tmp_path: Path
) -> None:
    make("runs/good", seed=0)
    make("runs/longer", seed=1, steps=100)
    found = gather([tmp_path / "runs"])
    assert [run.seed for run in found.runs] == [0]
    ((folder, reason),) = found.skipped
    assert folder.name == "longer"
    assert reason.startswith("result.json is of 100 meta-steps and config.yaml of 2000")


def test_a_seed_that_occurs_twice_counts_once_and_another_score_of_it_is_told(
    make: Make, tmp_path: Path
) -> None:
    make("runs/a", value=0.5)
    make("runs/b", value=0.5)
    make("runs/c", value=0.75, settings={"data.root": "/elsewhere"})
    (board,), notes = compared(tmp_path / "runs")
    (group,) = board.groups
    assert (len(group.runs), group.value) == (1, 0.5)
    assert [note.partition("(")[2] for note in notes] == [
        "same settings, same seed): it is not counted",
        "same settings, same seed, but a score of 0.75 and not 0.5): it is not counted",
    ]


def test_runs_on_several_devices_say_so(make: Make, tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        for seed, device in enumerate(("CPU (1 thread)", "GPU")):
            make(f"{lr}-{seed}", seed=seed, device=device, settings={"inner_opt.lr": lr})
    (board,), _ = compared(tmp_path)
    header, rows = board_table(board)
    assert header[-1] == "device"
    assert [row[-1].text for row in rows] == ["CPU (1 thread), GPU"] * 2


Drawn = dict[str, list[Any]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What is drawn: lines, bands and bars."""
    found: Drawn = {"plot": [], "fill_between": [], "barh": []}
    for name in found:
        real = getattr(matplotlib.axes.Axes, name)

        def watch(axes: Any, *given: Any, name: str = name, real: Any = real, **style: Any) -> Any:
            found[name].append(
                (*([*map(float, v)] for v in given if not isinstance(v, float)), style)
            )
            return real(axes, *given, **style)

        monkeypatch.setattr(matplotlib.axes.Axes, name, watch)
    return found


def test_pictures_show_means_whole_bands_and_the_highest_memory(
    make: Make, tmp_path: Path, drawn: Drawn
) -> None:
    curves = [[0.2, 0.5, 0.6], [0.3, 0.4, 0.8], [0.1, 0.6, 0.5]]
    for seed, curve in enumerate(curves):
        make(
            f"runs/{seed}", seed=seed, curve=curve, value=0.5 + 0.1 * seed,
            peak_memory_gib=(2.0, 5.0, 3.0)[seed], train_seconds=(10.0, 20.0, 60.0)[seed],
            speeds=[160.0 * (seed + 1)],
        )  # fmt: skip
    (board,), _ = compared(tmp_path / "runs")
    made = plots(board)
    assert [plot.title for plot in made] == [
        "Validation accuracy by meta-step", "Validation accuracy by time",
        "Inner loop: test accuracy by inner step", "Inner loop: test loss by inner step", "Cost",
    ]  # fmt: skip
    by_step = [list(column) for column in zip(*curves, strict=True)]
    inner = [[0.2] * 3, [0.9] * 3, [0.5, 0.6, 0.7]]
    expected = [([100, 200, 300], by_step), ([3, 6, 9], by_step), ([0, 1, 2], inner)]
    for (x, y, _), (low_x, low, high, _), (own_x, columns) in zip(
        drawn["plot"][:3], [(b[0], b[1], b[2], b[3]) for b in drawn["fill_between"][:3]], expected,
        strict=True,
    ):  # fmt: skip
        means, widths = [fmean(c) for c in columns], [t_interval(c) for c in columns]
        assert x == low_x == own_x and y == pytest.approx(means)
        assert low == pytest.approx([m - w for m, w in zip(means, widths, strict=True)])
        assert high == pytest.approx([m + w for m, w in zip(means, widths, strict=True)])
    assert [values[1] for values in drawn["barh"]] == [[30.0], [20.0], [5.0]]
    assert all("95 % confidence interval over seeds" in plot.caption for plot in made[:4])


def test_a_curve_has_the_steps_that_all_seeds_have(make: Make, tmp_path: Path) -> None:
    make("runs/0", seed=0, curve=[0.2, 0.4, 0.6])
    make("runs/1", seed=1, curve=[0.4, 0.6])
    (board,), _ = compared(tmp_path / "runs")
    assert board.groups[0].curve("val/accuracy") == {100: [0.2, 0.4], 200: [0.4, 0.6]}
    assert board.groups[0].validation_times() == {100: 3.0, 200: 6.0}


def test_pictures_choose_each_optimizer_s_best_by_validation(
    make: Make, tmp_path: Path, drawn: Drawn
) -> None:
    for i, (name, lr, validation, value) in enumerate(
        [("sgd", 0.1, 0.9, 0.3), ("sgd", 0.2, 0.5, 0.8), ("adam", 0.1, 0.4, 0.9),
         ("adam", 0.3, 0.6, 0.2)]
    ):  # fmt: skip
        own = {"inner_opt.name": name, "inner_opt.lr": lr}
        make(f"runs/{i}", validation=validation, value=value, settings=own)
    (board,), _ = compared(tmp_path / "runs")
    made = {plot.title: plot for plot in plots(board)}
    assert "best settings by validation" in made["Inner loop: test accuracy by inner step"].caption
    ends = [y[-1] for _, y, _ in drawn["plot"] if len(y) == 3 and y[0] == 0.2]
    assert ends == [0.2, 0.3], "the best of all is drawn last, on top"


def test_a_method_without_inner_loop_has_no_inner_optimizer(make: Make, tmp_path: Path) -> None:
    own = {"algo.name": "protonet"}
    make("runs/0", settings=own, inner_steps=None)
    (board,), _ = compared(tmp_path / "runs")
    assert [group.label for group in board.groups] == ["protonet"]
    assert board_table(board)[0][0] == "algo" and "inner_opt" not in board_table(board)[0]
    assert groups_csv([board]).startswith("algo.name,score")
    make("runs/1", settings=own | {"inner_opt.lr": 3.0}, inner_steps=None, seed=1)
    (board,), _ = compared(tmp_path / "runs")
    assert [len(group.runs) for group in board.groups] == [2], "what changes nothing splits nothing"
    for i, lr in enumerate((0.1, 0.2)):
        make(f"runs/maml-{i}", settings={"inner_opt.lr": lr})
    (board,), _ = compared(tmp_path / "runs")
    labels = sorted(group.label for group in board.groups)
    assert labels == ["maml, lr=0.1", "maml, lr=0.2", "protonet"]
    assert best_by_optimizer(board)[0].settings["algo.name"] == "maml"
    assert len(best_by_optimizer(board)) == 1


def test_long_labels_that_begin_alike_stay_apart_in_a_legend(
    make: Make, tmp_path: Path, drawn: Drawn
) -> None:
    for i, end in enumerate("ab"):
        name = {"inner_opt.name": "i" * 70 + end}
        make(f"runs/{i}", curve=[0.1, 0.2], settings=name)
    (board,), _ = compared(tmp_path / "runs")
    plots(board)
    labels = [style["label"] for _, _, style in drawn["plot"][:2]]
    assert len(set(labels)) == 2
