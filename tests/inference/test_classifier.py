"""`metarun.FewShotClassifier`: scikit-learn's protocol on a trained run."""

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone, is_classifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import (
    check_estimator_cloneable,
    check_estimator_repr,
    check_get_params_invariance,
    check_no_attributes_set_in_init,
    check_set_params,
)

import metarun
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError, DataError
from metarun.inference.examples import to_examples
from metarun.pictures.decode import Preprocessing
from metarun.pictures.inputs import Inputs
from metarun.system.one_at_a_time import OneAtATime
from tests.inference.runs import GLYPHS, draw, save, weights_of, write_run
from tests.setups import task_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Episodes]]:
    folder = tmp_path_factory.mktemp("run")
    setup = write_run(folder, *GLYPHS, "algo=protonet", "backbone.norm=support")
    yield folder, task_of(setup, 3, "test")


def test_it_is_the_predictor_of_the_run(run: tuple[Path, Episodes]) -> None:
    folder, task = run
    trained = metarun.load(folder)
    scores = trained.algorithm.adapt(weights_of(folder), task.support_x, task.support_y, 3)
    expected = scores(task.query_x).softmax(1).numpy()
    names = np.array(["x", "y", "z"])
    classifier = metarun.FewShotClassifier(folder)
    fitted = classifier.fit(task.support_x, names[task.support_y])
    assert fitted is classifier and classifier.classes_.tolist() == ["x", "y", "z"]
    found = classifier.predict_proba(task.query_x)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert classifier.predict(task.query_x).tolist() == names[expected.argmax(1)].tolist()
    in_pieces = metarun.FewShotClassifier(folder, batch=4).fit(task.support_x, task.support_y)
    np.testing.assert_allclose(in_pieces.predict_proba(task.query_x), expected, atol=1e-12)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba(task.query_x), found)
    assert len(classifier.predict_proba(task.query_x[:0])) == 0


def test_pictures_are_the_same_in_every_form(run: tuple[Path, Episodes], tmp_path: Path) -> None:
    folder, task = run
    classifier = metarun.FewShotClassifier(folder).fit(task.support_x, task.support_y)
    expected = classifier.predict_proba(task.query_x)
    paths = [tmp_path / f"{number}.png" for number in range(len(task.query_x))]
    for path, ink in zip(paths, task.query_x, strict=True):
        save(path, ink)
    seen = (255 - (task.query_x * 255).round()).to(torch.uint8)
    forms = {
        "paths": paths,
        "texts": np.array(list(map(str, paths))),
        "PIL": [Image.open(path) for path in paths],
        "grey": seen[:, 0].numpy(),
        "RGB": seen.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(),
        "one channel": list(seen.permute(0, 2, 3, 1).numpy()),
        "tensors": seen,
        "list of tensors": list(seen),
        "inputs": task.query_x.numpy(),
        "rows": task.query_x.flatten(1).numpy(),
        "grey rows": seen.flatten(1).numpy(),
        "grey rows of a tensor": seen.flatten(1),
        "list of inputs": list(task.query_x),
    }
    for name, images in forms.items():
        found = classifier.predict_proba(images)
        np.testing.assert_allclose(found, expected, atol=1e-9, err_msg=name)


def test_a_single_picture_is_refused_in_every_form() -> None:
    """It would be as many grey pictures as it has rows, or channels."""
    inputs = Inputs(Preprocessing(28, color="grey"))
    array = np.zeros((40, 30, 3), np.uint8)
    for one in (
        array,
        array[:, :, :1],
        np.zeros((40, 30, 4), np.uint8),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"that of a single picture: give a list, \[picture\]"):
            to_examples(one, inputs)
        with pytest.raises(ValueError, match=r"single picture: give a list, \[picture\]"):
            to_examples(Image.new("L", (3, 3)), inputs)
    for several in (
        array.transpose(2, 0, 1),
        array[None, :, :, :1].repeat(3, 0),
        [array] * 3,
        torch.zeros(3, 1, 40, 30, dtype=torch.uint8),
    ):
        assert to_examples(several, inputs).shape == (3, 1, 28, 28)
    assert to_examples(torch.zeros(1, 40, 30, dtype=torch.uint8), inputs).shape == (1, 1, 28, 28)


def test_what_is_no_picture_is_refused(run: tuple[Path, Episodes], tmp_path: Path) -> None:
    inputs = Inputs(Preprocessing(28, color="grey"))
    for images, words in (
        ("a.png", "single picture"),
        (3, "int: give a sequence"),
        (np.zeros((2, 28, 28), np.int64), "images are int64"),
        (np.zeros((2, 5)), r"inputs of this run's network are \(pictures, 1, 28, 28\)"),
        (np.full((2, 784), 255.0), "divide by 255"),
        (np.full((2, 784), np.nan), "divide by 255"),
        (np.zeros((28, 28), np.uint8), r"uint8 of shape \(28, 28\): as rows they would be \(pict"),
        ([np.zeros((4, 4, 2), np.uint8)], r"uint8 ndarray of shape \(4, 4, 2\)"),
        ([np.zeros((0, 4), np.uint8)], "a picture is"),
        ([None], r"images\[0\] is a NoneType"),
    ):
        with pytest.raises(ValueError, match=words):
            to_examples(images, inputs)
    colours = Inputs(Preprocessing(28, color="rgb"))
    for size in (784, 3 * 784):
        with pytest.raises(ValueError, match=r"and this one gets \(3, 28, 28\); give a list"):
            to_examples(np.zeros((2, size), np.uint8), colours)
    with pytest.raises(DataError, match="cannot read the picture"):
        to_examples([tmp_path / "nothing.png"], inputs)
    draw(tmp_path / "whole.png", (90, 90))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    match = r"cannot read the picture images\[0\]"
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(DataError, match=match):
        to_examples([cut], inputs)


def test_what_cannot_be_fitted_is_refused(run: tuple[Path, Episodes], tmp_path: Path) -> None:
    folder, task = run
    classifier = metarun.FewShotClassifier(folder)
    with pytest.raises(ValueError, match="call fit first"):
        classifier.predict(task.query_x)
    with pytest.raises(ValueError, match="have 1 class: give examples of two"):
        classifier.fit(task.support_x, [1] * 6)
    with pytest.raises(ValueError, match="6 images and 2 labels"):
        classifier.fit(task.support_x, [1, 2])
    missing = torch.tensor([1.0, torch.nan])
    for labels in ([1, None], ["a", None], ["a", np.nan], [1.0, np.float32("nan")], missing):
        with pytest.raises(ValueError, match=r"labels\[1\] is None or NaN: leave out"):
            classifier.fit(task.support_x[:2], labels)
    with pytest.raises(ConfigError, match="no such run directory"):
        metarun.FewShotClassifier(tmp_path / "nowhere").fit(task.support_x, task.support_y)
    with pytest.raises(ValueError, match="sets of labels take a calibration"):
        classifier.fit(task.support_x, task.support_y).predict_set(task.query_x)
    for settings, told in (({"coverage": 1.0}, "coverage=1.0: must be above 0 and below 1"),
                           ({"batch": 0}, "batch=0: must be 1 or more"),
                           ({"calibration_tasks": 1}, "calibration_tasks=1: must be from 2"),
                           ({"data_root": "x"}, "data.root: data=glyphs has no such")):  # fmt: skip
        wrong = metarun.FewShotClassifier(folder, calibrate=True, **settings)
        with pytest.raises(ConfigError, match=told):
            wrong.fit(task.support_x, task.support_y)
    for alone in ({"coverage": 0.5}, {"calibration_tasks": 30}):
        with pytest.raises(ConfigError, match="it goes with calibrate=true; give both"):
            metarun.FewShotClassifier(folder, **alone).fit(task.support_x, task.support_y)
    with pytest.raises(ValueError, match="no parameter 'shots'"):
        classifier.set_params(shots=3)


def test_it_has_the_protocol_of_scikit_learn(run: tuple[Path, Episodes]) -> None:
    folder, task = run
    classifier = metarun.FewShotClassifier(str(folder))
    for check in (
        check_estimator_cloneable,
        check_estimator_repr,
        check_get_params_invariance,
        check_no_attributes_set_in_init,
        check_set_params,
    ):
        check("FewShotClassifier", classifier)
    assert is_classifier(classifier)
    images = torch.cat([task.support_x, task.query_x]).flatten(1).numpy()
    labels = torch.cat([task.support_y, task.query_y]).numpy()
    scores = cross_val_score(clone(classifier), images, labels, cv=2)
    parts = StratifiedKFold(2).split(images, labels)
    own = [
        classifier.fit(images[seen], labels[seen]).score(images[new], labels[new])
        for seen, new in parts
    ]
    assert scores.tolist() == own
    pipeline = make_pipeline(FunctionTransformer(), classifier).fit(images, labels)
    assert pipeline.score(images, labels) == classifier.fit(images, labels).score(images, labels)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that are changed as often as can be: what they share is in use when they are."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize(
    "settings", [("algo=maml", "algo.eval_inner_steps=2", "inner_opt.lr=1"), ("algo=protonet",)]
)
def test_threads_take_turns(tmp_path: Path, hasty: None, settings: tuple[str, ...]) -> None:
    """The adapted weights stand in a network that all classifiers of a run have."""
    setup = write_run(tmp_path, *GLYPHS, *settings, "backbone.norm=support")
    tasks = [task_of(setup, number, "test") for number in range(4)]
    trained = metarun.load(tmp_path)
    copied = copy.deepcopy(trained)

    def fitted(place: int) -> Any:
        task = tasks[place]
        own = metarun.FewShotClassifier(tmp_path).fit(task.support_x, task.support_y)
        return [copy.deepcopy(own).predict_proba(tasks[place].query_x) for _ in range(15)]

    def adapted(place: int) -> Any:
        task, run = tasks[place], (trained, copied)[place % 2]
        predict = run.adapt(task.support_x, task.support_y, 3)
        return [predict(task.query_x).numpy() for _ in range(15)]

    for found_by in (fitted, adapted):
        alone = [found_by(place) for place in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(found_by, range(4)))
        np.testing.assert_array_equal(together, alone, err_msg=found_by.__name__)
    assert not np.allclose(alone[0], alone[1]), "the tasks are the same"


def test_runs_are_loaded_one_after_the_other(tmp_path: Path, hasty: None) -> None:
    """Each network is built by random numbers, of which a process has one sequence."""
    write_run(tmp_path, *GLYPHS, "algo=maml")
    expected = metarun.load(tmp_path).model.state_dict()
    with ThreadPoolExecutor(4) as pool:
        found = [run.model.state_dict() for run in pool.map(metarun.load, [tmp_path] * 8)]
    for name, value in expected.items():
        assert all(torch.equal(own[name], value) for own in found), name


def test_a_lock_is_copied_and_pickled_with_what_has_it() -> None:
    lock = OneAtATime()
    assert copy.deepcopy([lock])[0] is copy.copy(lock) is lock
    again = pickle.loads(pickle.dumps(lock))
    with lock, lock, again:
        assert again is not lock
