"""Temperature, reliability, label sets and strangers, against definitions written out."""

import copy
import csv
import io
import json
import math
import pickle
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from metarun.components.data.lake import LakeRuns
from metarun.config.trained import EvalConfig, ExportConfig, PredictConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes
from metarun.errors import ConfigError, RunError
from metarun.inference import calibration
from metarun.inference.calibrated import calibrate, measured, refuse_calibration, too_few
from metarun.inference.classifier import FewShotClassifier
from metarun.inference.diagram import reliability_diagram
from metarun.inference.familiarity import familiar, unfamiliarity
from metarun.inference.judgement import joined, labels_in
from metarun.inference.outcomes import Outcomes, each_task, outcomes
from metarun.inference.trained import load
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, write_run, write_task
from tests.setups import SINE, setup_of, task_of


def drawn(tasks: int, seed: int, sharpness: float = 1.0) -> Outcomes:
    """Scores whose softmax, sharpened, is how labels are drawn; tasks differ in how hard they are.

    Unknown queries have scores that are lower.
    """
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(tasks, 1, 1, generator=generator, dtype=torch.float64) * 3
    scores = torch.randn(tasks, 12, 4, generator=generator, dtype=torch.float64) * hard
    labels = torch.multinomial(scores.flatten(0, 1).softmax(1), 1, generator=generator)
    unknown = torch.randn(tasks, 8, 4, generator=generator, dtype=torch.float64) - 2
    classes = torch.arange(tasks)[:, None].expand(tasks, 12)  # each task has its own
    return Outcomes(scores * sharpness, labels.view(tasks, 12), classes, unknown * sharpness)


def test_the_temperature_is_where_the_cross_entropy_is_least() -> None:
    found = drawn(400, 0, sharpness=3.0)
    own = calibration.fit_temperature(found.scores, found.labels)
    assert own == pytest.approx(3.0, rel=0.06)

    def theirs(temperature: float) -> float:
        probabilities = (found.scores.flatten(0, 1) / temperature).softmax(1)
        return float(log_loss(found.labels.flatten(), probabilities))

    assert theirs(own) < min(theirs(own * 1.01), theirs(own / 1.01))
    for scale in (1e-5, 1e5):  # as of squared distances, which have no natural one
        scaled = calibration.fit_temperature(found.scores * scale, found.labels)
        assert scaled == pytest.approx(own * scale, rel=1e-6)
    assert calibration.fit_temperature(torch.ones(2, 3, 4), torch.zeros(2, 3).long()) == 1.0
    zero = torch.tensor([[[0.0, -math.inf], [0.0, 0.5]]])  # a probability of 0
    assert math.isfinite(calibration.fit_temperature(zero, torch.tensor([[1, 0]])))


def test_reliability_is_that_of_its_definition() -> None:
    found = drawn(50, 1)
    probabilities = found.scores.softmax(-1)
    bins = calibration.reliability(probabilities, found.labels)
    rows, truth = probabilities.flatten(0, 1).tolist(), found.labels.flatten().tolist()
    error = 0.0
    for one in bins:
        inside = [(row, y) for row, y in zip(rows, truth, strict=True)
                  if one.low < max(row) <= one.high]  # fmt: skip
        assert one.predictions == len(inside)
        if inside:
            right = sum(row.index(max(row)) == y for row, y in inside) / len(inside)
            sure = sum(max(row) for row, _ in inside) / len(inside)
            assert (one.accuracy, one.confidence) == pytest.approx((right, sure))
            error += len(inside) / len(rows) * abs(right - sure)
    assert calibration.calibration_error(bins) == pytest.approx(error)
    assert len(bins) == 15 and bins[-1].high == 1


def weighed_quantile(values: Tensor, classes: Tensor, level: float) -> float:
    """The quantile of Lee, Barber and Willett, by its definition."""
    counts = Counter(classes.flatten().tolist())
    total = 0.0
    pairs = zip(values.flatten().tolist(), classes.flatten().tolist(), strict=True)
    for value, number in sorted(pairs):
        total += 1 / ((len(counts) + 1) * counts[number])
        if total >= level - 1e-12:
            return float(value)
    return math.inf


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9, 10 / 11, 0.95])
def test_the_bound_is_the_quantile_in_which_classes_weigh_the_same(level: float) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(20, 7, generator=generator, dtype=torch.float64)
    classes = (torch.rand(20, 7, generator=generator) ** 2 * 10).long() + 5
    assert len(classes.unique()) == 10
    found = calibration.class_quantile(values, classes, level)
    assert found == weighed_quantile(values, classes, level)
    assert math.isinf(found) == (calibration.classes_needed(level) > 10)


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_the_bound_holds_for_new_classes_where_few_are_seen_in_many_tasks(level: float) -> None:
    """A thousand tasks of twelve classes; how hard a query is, its class and others decide."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    covered, by_task = [], []
    for _ in range(400):
        hard, new = draw(12), draw(2000)
        classes = torch.rand(1000, 12, generator=generator).argsort(1)[:, :5]
        others = hard[classes].mean(1, keepdim=True)
        values = hard[classes] + others + 0.3 * draw(1000, 5)
        fresh = new + (new + draw(2000) * 2) / 5 + 0.3 * draw(2000)
        bound = calibration.class_quantile(values, classes, level)
        covered.append(float((fresh <= bound).double().mean()))
        plain = float(values.flatten().quantile(level))
        by_task.append(float((fresh <= plain).double().mean()))
    assert level <= sum(covered) / 400 < level + 0.1
    assert sum(by_task) / 400 < level - 0.02  # what tasks as independent draws would give


def test_the_interval_of_a_rate_is_over_classes() -> None:
    """Over many draws it holds the true rate as often as it says; one over queries does not."""
    generator = torch.Generator().manual_seed(0)
    inside, narrow = [], []
    for _ in range(400):
        hard = torch.rand(30, generator=generator, dtype=torch.float64)  # a rate of each class
        classes = torch.randint(30, (500, 4), generator=generator)
        happened = torch.rand(500, 4, generator=generator, dtype=torch.float64) < hard[classes]
        rate, half = calibration.rate_over_classes(happened, classes)
        assert rate == pytest.approx(float(happened.double().mean()))
        inside.append(abs(rate - 0.5) < half)
        narrow.append(abs(rate - 0.5) < 1.96 * float(happened.double().std()) / 2000**0.5)
    assert 0.92 < sum(inside) / 400 < 0.98
    assert sum(narrow) / 400 < 0.6


def test_too_few_classes_for_a_promise_are_told() -> None:
    words = too_few(8, 0.9, 0.05)
    assert len(words) == 2 and "8 validation classes" in words[0]
    assert "90 %, which takes 9" in words[0] and "5 % false alarms, which takes 19" in words[1]
    assert too_few(8, 0.9) == words[:1]
    assert [calibration.classes_needed(1 - 10.0**-n) for n in (1, 2, 3, 4)] == [9, 99, 999, 9999]
    assert "0.01 % false alarms" in too_few(9, 0.9, 1e-4)[0]
    assert too_few(9, 0.9, 0.1) == [] and len(too_few(18, 0.9, 0.05)) == 1
    own = calibrate(drawn(8, 0))
    assert own.sets(torch.randn(5, 4), 0.9).all() and not own.is_none(torch.randn(5, 4), 0.05).any()


def test_sets_cover_and_false_alarms_come_as_promised_on_new_tasks() -> None:
    """Over many calibrations, in tasks of which some are much harder than others."""
    covered, alarms = [], []
    for seed in range(30):
        own = calibrate(drawn(60, seed, sharpness=2.0))
        figures = measured(own, drawn(60, 1000 + seed, sharpness=2.0), 0.8, 0.1)
        covered.append(figures["measured_coverage"])
        alarms.append(figures["measured_false_alarms"])
    few = sum(covered) / 30, sum(alarms) / 30
    assert 0.8 <= few[0] < 0.83 and 0.07 < few[1] <= 0.1
    own = calibrate(drawn(9, 0))
    assert measured(own, drawn(5, 1), 0.95, 0.1)["measured_coverage"] == 1  # too few tasks


def test_strangers_rank_as_in_scikit_learn() -> None:
    known, unknown = torch.randint(9, (40,)).double(), torch.randint(2, 12, (30,)).double()
    truth = [0] * 40 + [1] * 30
    expected = roc_auc_score(truth, torch.cat([known, unknown]))
    assert calibration.ranking(known, unknown) == pytest.approx(float(expected))


@pytest.mark.parametrize("norm", ["support", "transductive"])
def test_known_queries_are_those_of_the_evaluation(tmp_path: Path, norm: str) -> None:
    setup = write_run(tmp_path, *GLYPHS, "algo=protonet", f"backbone.norm={norm}")
    assert isinstance(setup.source, ImageEpisodes)
    trained = load(tmp_path, with_data=True)
    found = outcomes(trained, "test", 3)
    trace = setup.trace(trained.meta, setup.source.sample("test", 0, 3))
    right = (found.scores.argmax(-1) == found.labels).double().mean(1)
    assert right.tolist() == trace.query_score[:, -1].tolist()
    assert found.unknown is not None and found.unknown.shape == (3, 6, 3)
    store, tasks = setup.source.stores["test"], setup.source.sample("test", 0, 3)
    for number, image in zip(found.classes.flatten(), tasks.query_x.flatten(0, 1), strict=True):
        rows = torch.arange(int(store.sizes[number])) + store.starts[number]
        assert (setup.source.values(store.take(rows)) == image).flatten(1).all(1).any()
    wide = setup.source.with_more_classes(3).sample("test", 1, 1)
    both = wide.query_x[0] if norm == "transductive" else wide.query_x[0, 6:]
    task = task_of(setup, 1, "test")
    strangers = trained.adapt(task.support_x, task.support_y, 3)(both)[-6:]
    torch.testing.assert_close(found.unknown[1], strangers)
    assert len(wide.query_y[0].unique()) == 6
    uneven = outcomes(trained, "test", 1, counts=[2, 1, 1])
    task = task_of(setup, 0, "test")
    kept = [0, 1, 2, 4]
    expected = trained.adapt(task.support_x[kept], task.support_y[kept], 3)(task.query_x)
    torch.testing.assert_close(uneven.scores[0], expected)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """One task of them would decide the temperature and every bound."""
    write_run(tmp_path, *GLYPHS, "algo=protonet")
    trained = load(tmp_path, with_data=True)
    given = iter([False, True])

    def adapt(meta: object, x: Tensor, y: Tensor, way: int | None) -> Any:
        wrong = next(given)
        return lambda x: torch.full((len(x), 3), math.nan if wrong else 0.0)

    broken = trained.setup.algorithm._replace(adapt=adapt)
    trained = replace(trained, setup=replace(trained.setup, algorithm=broken))
    with pytest.raises(RunError, match="val task 1: the adapted network gives scores that are no"):
        outcomes(trained, "val", 3)
    given = iter([False, False, True])
    with pytest.raises(RunError, match="test task 2: "):
        assert isinstance(trained.setup.source, ImageEpisodes)
        list(each_task(trained, trained.setup.source, "test", 3))


def test_unknown_pictures_are_of_any_class_where_tasks_are_of_one_group(tmp_path: Path) -> None:
    """Beyond the group's own classes they are drawn, and not always the same."""
    setup = setup_of("data=glyphs", "algo=protonet", "backbone=mlp", "task.within=group",
                     "task.way=16", "task.shot=1", "task.query=1")  # fmt: skip
    assert isinstance(setup.source, ImageEpisodes)
    narrow, wide = setup.source, setup.source.with_more_classes(40)
    few, many = narrow.classes("test", 0, 50), wide.classes("test", 0, 50)
    assert torch.equal(many[:, :16], few)
    groups = narrow._groups["test"]
    assert groups is not None
    for own, row in zip(few, many, strict=True):
        assert len(row.unique()) == 56
        mine = groups.of_class[row] == groups.of_class[own[0]]
        assert not mine[int(mine.sum()) :].any(), "the group's own come first"
    counts = torch.bincount(many[:, 25:].flatten(), minlength=len(groups.of_class))
    assert counts.max() < 3 * counts.float().mean(), counts


def test_unfamiliarity_is_the_share_of_validation_pictures_that_are_nearer(tmp_path: Path) -> None:
    setup = write_run(tmp_path, *GLYPHS, "algo=protonet")
    assert isinstance(setup.source, ImageEpisodes)
    compared = familiar(setup.source)
    assert len(compared.training) == len(compared.distances) == 1000
    validation = setup.source.sample("val", 0, 20).query_x.flatten(0, 1)
    assert 35 < float(unfamiliarity(validation, compared).mean()) < 65
    training = setup.source.values(setup.source.stores["train"].images[:1])
    assert float(unfamiliarity(training, compared)) == 0  # it is one of them
    assert float(unfamiliarity(1 - validation, compared).min()) == 100  # black paper


@pytest.mark.parametrize("each", [95, 150])  # 1.9 and 3 times as many pictures as are compared
def test_unfamiliarity_knows_all_classes_of_training(each: int) -> None:
    """A picture of the last class is as familiar as one of the first."""
    grey = torch.arange(20, dtype=torch.uint8) * 10

    def store(classes: int, count: int) -> ClassStore:
        images = grey[:classes, None, None, None, None].expand(-1, count, 1, 28, 28)
        return from_equal_classes(images, list(map(str, range(classes))))

    stores = {"train": store(20, each), "val": store(5, 20), "test": store(5, 20)}
    device = torch.device("cpu")
    source = ImageEpisodes(stores, way=2, shot=1, query=1, seed=0, device=device)
    compared = familiar(source)
    assert len(compared.training) == 1000
    own = source.values(grey[:, None, None, None].expand(-1, 1, 28, 28))
    assert unfamiliarity(own, compared).tolist() == [0.0] * 20


@pytest.mark.parametrize(
    "names", [[], ["a"], ["a|b", "c"], ["a\\", "|", "b\\|c|"], ["kitten", "puppy", "a b"]]
)
def test_a_set_of_labels_is_read_back_as_it_was(names: list[str]) -> None:
    assert labels_in(joined(names)) == names


def test_an_evaluation_says_what_its_probabilities_are_worth(
    metarun: Metarun, tmp_path: Path
) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=protonet")
    evaluate = ("eval", "ckpt=run", "episodes=20", "hydra.run.dir=eval")
    done = metarun(*evaluate, "calibrate=true", "coverage=0.8", "false_alarms=0.2")
    stored = json.loads((tmp_path / "eval" / "result.json").read_text())["test"]["calibration"]
    assert isinstance(setup.source, ImageEpisodes)
    classes = len(setup.source.classes("val", 0, 20).unique())
    said = f"calibrated on 20 validation tasks of {classes} classes, measured on 20 test tasks"
    assert said in done.stdout and stored["calibration_classes"] == classes
    half = 100 * stored["measured_coverage_ci95"]
    assert f"cover {100 * stored['measured_coverage']:.1f} ± {half:.1f} %" in done.stdout
    assert abs(stored["measured_coverage"] - 0.8) < 0.15
    assert abs(stored["measured_false_alarms"] - 0.2) < 0.15
    assert len(stored["reliability"]) == 15
    filled = [one for one in stored["reliability"] if one["predictions"]]
    (axes,) = reliability_diagram(stored).axes
    points = axes.collections[1].get_offsets()
    assert points.tolist() == [[one["confidence"], one["accuracy"]] for one in filled]
    assert (tmp_path / "eval" / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_what_says_nothing_of_new_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"coverage=1.0: must be above 0 and below 1"):
        EvalConfig(coverage=1.0)
    with pytest.raises(ConfigError, match=r"false_alarms=0.0: must be above 0"):
        EvalConfig(false_alarms=0.0)
    pictures = partial(PredictConfig, "run", "support", "query")
    for config, key, value in (
        (EvalConfig, "coverage", 0.5),
        (EvalConfig, "false_alarms", 0.5),
        (pictures, "coverage", 0.5),
        (pictures, "false_alarms", 0.5),
        (pictures, "calibration_tasks", 30),
        (ExportConfig, "calibration_tasks", 30),
    ):
        with pytest.raises(ConfigError, match=rf"{key}={value}: it goes with calibrate=true; give"):
            config(**{key: value})
        assert getattr(config(**{key: value}, calibrate=True), key) == value
    setup = setup_of(*GLYPHS, "algo=protonet")
    with pytest.raises(ConfigError, match="would measure on the same ones: choose split=test"):
        refuse_calibration(setup, "val")
    drawings = torch.zeros(400, 2, 1, 4, 4, dtype=torch.uint8)
    names = [f"run{n // 20 + 1:02}/class{n % 20 + 1:02}" for n in range(400)]
    lake = LakeRuns(
        from_equal_classes(drawings, names), seed=0, device=setup.device, dtype=torch.float32
    )
    with pytest.raises(ConfigError, match="calibrate=true: data=glyphs has fixed tasks, and does"):
        refuse_calibration(replace(setup, source=lake), "test")
    no_val = copy.copy(setup.source)
    no_val.stores = {"test": setup.source.stores["test"]}
    with pytest.raises(ConfigError, match="data=glyphs has no validation tasks to calibrate on"):
        refuse_calibration(replace(setup, source=no_val), "test")
    with pytest.raises(ConfigError, match="is for one checkpoint: leave ensemble out"):
        EvalConfig(calibrate=True, ensemble=2)
    with pytest.raises(ConfigError, match="is for data of labelled images, not for data=sinusoid"):
        refuse_calibration(setup_of(*SINE), "test")


def test_labels_are_judged_by_the_data_of_the_run(metarun: Metarun, tmp_path: Path) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=protonet")
    write_task(tmp_path, task_of(setup, 3, "test"))
    (tmp_path / "support" / "class1" / "2.png").unlink()
    command = ("predict", "ckpt=run", "support=support", "query=query", "calibrate=true",
               "calibration_tasks=30")  # fmt: skip
    done = metarun(*command)
    first = (tmp_path / "predictions.csv").read_text()
    header = "path,label,probability,set,none_of_these,unfamiliarity,class0,class1,class2"
    assert first.splitlines()[0] == header
    assert "calibrated on 30 validation tasks" in done.stdout and "50 % is usual" in done.stdout
    assert "kept for the next time" in done.stderr
    again = metarun(*command)
    assert "kept for the next time" not in again.stderr
    assert (tmp_path / "predictions.csv").read_text() == first
    rows = list(csv.DictReader(io.StringIO(first)))
    examples = sorted((tmp_path / "support").glob("*/*.png"))
    queries = [row["path"] for row in rows]
    classifier = FewShotClassifier(tmp_path / "run", calibrate=True, calibration_tasks=30)
    classifier.fit(examples, [path.parent.name for path in examples])
    calibrated = classifier.predict_proba([tmp_path / path for path in queries])
    wanted = [[float(row[f"class{label}"]) for label in range(3)] for row in rows]
    np.testing.assert_allclose(calibrated, wanted, rtol=1e-12)
    sets = classifier.predict_set([tmp_path / path for path in queries])
    assert ["|".join(one) for one in sets] == [row["set"] for row in rows]
    loaded = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(loaded.predict_proba(queries[:0]), calibrated[:0])
    assert len(loaded.predict_set([tmp_path / path for path in queries])) == len(sets)
    for number in range(40):
        (tmp_path / "support" / "class1" / f"more{number}.png").write_bytes(
            (tmp_path / "support" / "class1" / "3.png").read_bytes()
        )
    refused = metarun(*command, code=2)
    assert "validation tasks of 41 shots" in refused.stderr and not refused.stdout
    one = (tmp_path / "support" / "class1" / "3.png").read_bytes()
    for number in range(160):  # more than the data have for validation
        (tmp_path / "many" / f"c{number}").mkdir(parents=True)
        (tmp_path / "many" / f"c{number}" / "1.png").write_bytes(one)
    said = metarun(*command, "support=many", code=2).stderr
    assert "calibrate=true, with tasks of 160 classes: " in said and "val split" in said
    assert "calibrate=true" not in metarun(*command, "ckpt=nowhere", code=2).stderr
