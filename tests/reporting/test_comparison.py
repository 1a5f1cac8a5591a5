"""Differences between groups: right on simulated runs whose differences are known."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from metarun.reporting.comparison import (
    Difference,
    compare,
    difference,
    furthest_apart,
    of_units,
    tasks_to_decide,
    units_to_decide,
)
from metarun.reporting.comparison_table import NOTE, comparison_table, to_decide
from metarun.reporting.content import APART, report_on
from metarun.reporting.gather import Figures, Run
from metarun.reporting.groups import Board, Group
from metarun.reporting.text import markdown, terminal
from tests.reporting.test_report_figures import Make, configs, make

__all__ = ["configs", "make"]  # fixtures


def run(seed: int, by_task: Sequence[float], score: str = "accuracy") -> Run:
    value = float(np.mean(by_task)) if len(by_task) else 0.5
    test = Figures(
        score, value, 0.01, len(by_task), [value], [1.0], value, "CPU", 1.0, 0.1, None,
        by_task=by_task,
    )  # fmt: skip
    return Run(Path(f"run{seed}"), {"seed": seed}, "completed", None, test, [], 0, ("code",))


def group(label: str, runs: Sequence[Sequence[float]], score: str = "accuracy") -> Group:
    members = [run(seed, by_task, score) for seed, by_task in enumerate(runs)]
    return Group({}, members, label, {"algo.name": label})


def between(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference:
    found = difference(group("a", first), group("b", second), True)
    assert isinstance(found, Difference)
    return found


def simulated(
    rng: np.random.Generator, seeds: int, tasks: int, shift: float, between_seeds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two methods on shared tasks: hard tasks are hard for both."""
    hardness = rng.normal(0, 0.2, (seeds, tasks))
    of_seed = rng.normal(0, between_seeds, (2, seeds, 1))
    scores = 0.7 + hardness + of_seed + rng.normal(0, 0.05, (2, seeds, tasks))
    return scores[0] + shift, scores[1]


@pytest.mark.parametrize(("seeds", "tasks"), [(1, 60), (2, 20), (3, 20), (10, 20)])
def test_95_of_100_intervals_have_the_true_difference(seeds: int, tasks: int) -> None:
    rng = np.random.default_rng(seeds)
    many, shift = 4000, 0.013
    # One seed says nothing of others, so there is nothing between seeds that it could cover.
    spread = 0.0 if seeds == 1 else 0.02
    covered = 0
    for _ in range(many):
        found = between(*simulated(rng, seeds, tasks, shift, spread))
        covered += abs(found.value - shift) <= found.ci95
    assert 0.93 < covered / many < 0.97
    assert abs(covered / many - 0.95) < 4 * math.sqrt(0.95 * 0.05 / many)


@pytest.mark.parametrize("tasks", [40, 41])
def test_what_sets_sources_apart_is_no_chance(tasks: int) -> None:
    """Of tasks that two sources have in turn: one is easier, and one gains more by the method."""
    rng, many = np.random.default_rng(7), 2000
    gains = np.where(np.arange(tasks) % 2, 0.15, 0.05)
    covered, widths, p_below = 0, [], 0
    for _ in range(many):
        noise = rng.normal(0, 0.03, (2, tasks))
        first, second = (run(0, scores) for scores in (0.5 + gains + noise[0], 0.5 + noise[1]))
        both = [
            Group({}, [replace(one, test=replace(one.test, sources=2))], name, {"algo.name": name})
            for name, one in (("a", first), ("b", second))
            if one.test is not None
        ]
        found = difference(both[0], both[1], True)
        assert isinstance(found, Difference)
        true = float(gains.mean())
        covered += abs(found.value - true) <= found.ci95
        widths.append(found.ci95)
        p_below += found.p < 0.05
    assert abs(covered / many - 0.95) < 4 * math.sqrt(0.95 * 0.05 / many)
    assert np.mean(widths) == pytest.approx(2.02 * 0.03 * math.sqrt(2 / tasks), rel=0.02)
    assert p_below == many


def test_the_seed_that_differs_most_is_looked_at() -> None:
    first, second = [[0.5, 0.4], [0.9, 0.5]], [[0.5, 0.5], [0.1, 0.5]]
    one, other, apart = furthest_apart(
        compare(Board("", "accuracy", [group("a", first), group("b", second)], []))[0]
    )
    assert (one.seed, other.seed) == (1, 1) and apart == {0: pytest.approx(0.8)}


def test_equal_methods_are_told_apart_in_one_of_twenty_reports_at_most() -> None:
    """The correction holds for the family: five groups are ten comparisons."""
    rng = np.random.default_rng(0)
    many, false_claims, uncorrected = 600, 0, 0
    for _ in range(many):
        hardness = rng.normal(0, 0.2, (3, 10))
        groups = [
            group(str(g), hardness + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.05, (3, 10)))
            for g in range(5)
        ]
        found = compare(Board("", "accuracy", groups, []))
        assert len(found) == 10
        false_claims += any(one.decided for one in found)
        uncorrected += any(one.difference and one.difference.p < 0.05 for one in found)
    assert false_claims / many < 0.05 + 3 * math.sqrt(0.05 * 0.95 / many)
    assert uncorrected / many > 0.15  # what the correction is for


def test_figures_are_those_of_scipy() -> None:
    rng = np.random.default_rng(5)
    first, second = simulated(rng, 6, 30, 0.02, 0.03)
    found = between(first, second)
    by_seed = first.mean(1) - second.mean(1)
    t = stats.ttest_rel(first.mean(1), second.mean(1))
    assert found.p == pytest.approx(t.pvalue)
    low, high = t.confidence_interval(0.95)
    assert (found.value - found.ci95, found.value + found.ci95) == pytest.approx((low, high))
    wins = int((by_seed > 0).sum())
    assert (found.better, found.worse) == (wins, 6 - wins)
    assert found.sign_p == pytest.approx(stats.binomtest(wins, 6).pvalue)
    one = between(first[:1], second[:1])
    assert (one.unit, one.count) == ("task", 30)
    assert one.p == pytest.approx(stats.ttest_rel(first[0], second[0]).pvalue)


def test_pairing_needs_fewer_tasks_than_overlapping_intervals() -> None:
    rng = np.random.default_rng(1)
    first, second = simulated(rng, 1, 300, 0.02, 0.0)
    found = between(first, second)
    alone = 1.96 * math.hypot(first.std() / 300**0.5, second.std() / 300**0.5)
    assert found.ci95 < alone / 2 and found.p < 0.05 < stats.ttest_ind(first[0], second[0]).pvalue


def test_holm_is_that_of_the_paper() -> None:
    """Three groups whose p-values are known: the least is multiplied by 3, the next by 2."""
    rng = np.random.default_rng(2)
    base = rng.normal(0.7, 0.1, (1, 50))
    groups = [
        group(name, base + shift + rng.normal(0, 0.05, (1, 50)))
        for name, shift in (("a", 0.0), ("b", 0.015), ("c", 0.03))
    ]
    found = compare(Board("", "accuracy", groups, []))
    raw = [one.difference.p for one in found if one.difference]
    order = np.argsort(raw)
    wanted = np.empty(3)
    wanted[order] = np.minimum(1, np.maximum.accumulate(np.sort(raw) * [3, 2, 1]))
    assert [one.p for one in found] == pytest.approx(list(wanted))
    # The least p is below 0.05/3, the next one is not below 0.05/2: the procedure stops there.
    assert sorted(raw)[0] < 0.05 / 3 and sorted(raw)[1] > 0.05 / 2
    levels = [one.level for one in found]
    assert [levels[i] for i in order] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2])


def test_a_number_that_is_there_already_does_not_decide() -> None:
    """A comparison behind one at which Holm's procedure stopped is held to the level of that."""
    rng, blocked = np.random.default_rng(5), 0
    for _ in range(400):
        scores = rng.normal(0.79, 0.008, (3, 5, 2)) - 0.004 * np.arange(3)[:, None, None]
        groups = [group(name, own) for name, own in zip("abc", scores, strict=True)]
        found = compare(Board("", "accuracy", groups, []))
        for one in found:
            assert one.difference is not None
            assert one.decided == (one.difference.p < one.level)
            if not one.decided and one.difference.value:
                needed = units_to_decide(one.difference, one.level)
                assert needed is None or needed > one.difference.count
            blocked += not one.decided and one.difference.p < 0.05
    assert blocked > 20


def test_of_many_groups_the_first_is_compared_with_the_others() -> None:
    rng = np.random.default_rng(3)
    groups = [group(str(g), rng.normal(0.5, 0.1, (2, 5))) for g in range(7)]
    found = compare(Board("", "accuracy", groups, []))
    assert [(one.first.label, one.second.label) for one in found] == [
        ("0", str(g)) for g in range(1, 7)
    ]


@pytest.mark.parametrize("unit", ["seed", "task"])
def test_as_many_as_are_said_decide_and_one_less_does_not(unit: str) -> None:
    found = of_units([0.03, -0.01, 0.02, 0.015], unit, True, 0.0, 100)
    needed = units_to_decide(found, 0.05)
    assert needed is not None and needed > 4

    def half_width(count: int) -> float:
        t: float = stats.t.ppf(0.975, count - 1)
        return t * found.deviation / count**0.5

    assert half_width(needed) < found.value <= half_width(needed - 1)
    assert units_to_decide(found, 0.01) > needed  # type: ignore[operator]


def test_more_tasks_help_where_tasks_are_what_varies() -> None:
    second = np.full((4, 8), 0.6)
    of_seed = np.array([[0.05], [-0.03], [0.04], [-0.02]])  # less than the tasks account for
    first = second + of_seed + 0.12 * np.array([1, -1] * 4)
    found = between(first, second)
    assert found.p > 0.05
    assert found.within == pytest.approx(
        np.mean([(a - b).var(ddof=1) / 8 for a, b in zip(first, second, strict=True)])
    )
    needed = tasks_to_decide(found, 0.05)
    assert needed is not None and needed > 8
    shrunk = max(0.0, found.deviation**2 - found.within) + found.within * 8 / needed
    assert stats.t.ppf(0.975, 3) * math.sqrt(shrunk / 4) < abs(found.value)
    alike = of_units([0.3, -0.29, 0.2, -0.1], "seed", True, 0.0, 8)  # all between seeds
    assert tasks_to_decide(alike, 0.05) is None


def test_lower_errors_are_better() -> None:
    found = of_units([-0.1, -0.2, 0.1], "seed", False, 0.0, 5)
    assert (found.better, found.worse) == (2, 1)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ([[0.5, 0.6]], [[], [0.5, 0.7]], "scores by task are missing"),
        ([[0.5, math.nan]], [[0.5, 0.7]], "a task has no score"),
        ([[0.5]], [[0.7]], "one task of one seed has no spread"),
    ],
)
def test_what_cannot_be_compared_says_why(
    first: list[list[float]], second: list[list[float]], reason: str
) -> None:
    groups = [group("a", first), group("b", second)]
    assert difference(*groups, True) == reason
    found = compare(Board("", "accuracy", groups, []))
    assert not found[0].decided
    assert comparison_table(groups, found)[1][0][-1].text == reason


def test_other_tasks_of_the_same_seed_are_not_compared() -> None:
    first, second = group("a", [[0.5, 0.6]]), group("b", [[0.4, 0.6]])

    def named(of: Group, name: str | None) -> Group:
        (own,) = of.runs
        assert own.test is not None
        return replace(of, runs=[replace(own, test=replace(own.test, task_set=name))])

    told = difference(named(first, "tasks:1"), named(second, "tasks:2"), True)
    assert told == "the tasks of seed 0 are not the same: tasks:1 and tasks:2"
    for name in ("tasks:1", None):  # an older result has no name
        assert isinstance(
            difference(named(first, "tasks:1"), named(second, name), True), Difference
        )


def with_scores(folder: Path, by_task: Sequence[float]) -> None:
    result = json.loads((folder / "result.json").read_text())
    result["test"]["accuracy_per_task"] = list(by_task)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("last", [0.8, 0.4])
def test_the_tasks_that_differ_most_are_named(make: Make, tmp_path: Path, last: float) -> None:
    scores = {"maml": [0.5, 0.9, 0.7, 0.4], "anil": [0.5, 0.9 if last == 0.4 else 0.6, 0.7, last]}
    for name, by_task in scores.items():
        validation = 0.9 if name == "maml" else 0.8
        settings = {"algo.name": name}
        folder = make(f"runs/{name}", seed=3, settings=settings, validation=validation)
        with_scores(folder, by_task)
        (folder / "checkpoints").mkdir()
    lists = dict(report_on([tmp_path / "runs"])[0].lists)
    if last == 0.4:
        assert APART not in lists
        return
    (told,) = lists[APART]
    assert "seed 3: task 1 (+30.00 points), task 3 (-40.00 points): " in told
    runs = [f"metarun explain ckpt={tmp_path}/runs/{name} episode=1" for name in scores]
    assert told.endswith(" and ".join(runs))


def test_seeds_that_only_one_group_has_are_left_out() -> None:
    first, second = group("a", [[0.5, 0.6], [0.7, 0.9]]), group("b", [[0.4, 0.6], [0.8, 0.7]])
    second.runs.pop(0)
    found = difference(first, second, True)
    assert isinstance(found, Difference) and (found.unit, found.count) == ("task", 2)
    second.runs.clear()
    assert difference(first, second, True) == (
        "they share no seed, so they have met no task in common"
    )


def test_equal_and_constant_differences() -> None:
    same = of_units([0.0, 0.0, 0.0], "seed", True, 0.0, 5)
    assert (same.p, same.sign_p, units_to_decide(same, 0.05)) == (1.0, 1.0, None)
    for seed in ("seed", "task"):
        always = of_units([0.1 + 0.2, 0.3], seed, True, 0.0, 5)  # equal but for rounding
        assert always.p == always.sign_p == 0.5 and always.ci95 == 0
        assert (units_to_decide(always, 0.05), tasks_to_decide(always, 0.05)) == (6, None)
    assert of_units([0.25] * 6, "task", True, 0.0, 6).p == pytest.approx(2 / 2**6)


def test_equal_means_of_few_tasks_decide_nothing() -> None:
    """Two seeds of four tasks: the tasks say how far the means can be off."""
    by_task = np.array([[0.2, 0.0, 0.0, 0.2], [0.0, 0.2, 0.2, 0.0]])
    found = between(0.5 + by_task, np.full((2, 4), 0.5))
    deviation = math.sqrt(by_task[0].var(ddof=1) / 4)
    assert found.value == pytest.approx(0.1) and found.deviation == pytest.approx(deviation)
    expected = 2 * stats.t.sf(0.1 / (deviation / math.sqrt(2)), 1)
    assert found.p == pytest.approx(expected) and found.p > 0.05
    assert found.ci95 == pytest.approx(stats.t.ppf(0.975, 1) * deviation / math.sqrt(2))
    needed = tasks_to_decide(found, 0.05)
    assert needed is not None and needed > 4


def test_the_report_says_what_the_runs_differ_by(make: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    for seed in range(3):
        first, second = simulated(rng, 1, 40, 0.2, 0.01)
        for algo, scores in (("maml", first[0]), ("anil", second[0])):
            folder = make(
                f"{algo}{seed}", seed=seed, settings={"algo.name": algo},
                value=float(scores.mean()), validation=0.9 if algo == "maml" else 0.8,
            )  # fmt: skip
            result = json.loads((folder / "result.json").read_text())
            result["test"]["accuracy_per_task"] = scores.tolist()
            (folder / "result.json").write_text(json.dumps(result))
    report, tables = report_on([tmp_path])
    row = next(csv.DictReader(io.StringIO(tables["report_pairs.csv"])))
    assert (row["first"], row["second"], row["units"]) == ("maml", "anil", "3")
    assert float(row["difference"]) == pytest.approx(0.2, abs=0.05)
    assert row["decided"] == "True"
    header, cells = report.sections[0].pairs
    texts = dict(zip(header, (cell.text for cell in cells[0]), strict=True))
    assert texts["95 % CI over"] == "3 seeds" and texts["to decide"] == "decided"
    assert texts["difference"].startswith("+") and texts["difference"].endswith(" points")
    assert "differences, task by task" in terminal(report)
    assert NOTE in markdown(report) or "### Differences" in markdown(report)


def test_open_comparisons_say_what_would_decide_them() -> None:
    rng = np.random.default_rng(7)
    groups = [group(n, s) for n, s in zip("ab", simulated(rng, 3, 10, 0.01, 0.02), strict=True)]
    (found,) = compare(Board("", "accuracy", groups, []))
    assert found.difference is not None and not found.decided
    assert to_decide(found).startswith(f"{units_to_decide(found.difference, 0.05):,} seeds")
