"""A trained run as a classifier in scikit-learn's protocol, which need not be installed."""

import inspect
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarun.components.build import dtype_of
from metarun.config.changes import changed
from metarun.config.checks import at_least
from metarun.config.trained import EvalConfig, EvalData, PredictConfig
from metarun.inference.calibrated import too_few
from metarun.inference.examples import to_examples
from metarun.inference.judgement import Judgement, judge
from metarun.inference.outcomes import checked
from metarun.inference.predict import batches_of, inputs_of_run, usual_batch
from metarun.inference.trained import Trained, load
from metarun.rundir import checkpoint

NOT_PICKLED = ("_predict", "_judgement")
"""The adapted network and its calibration: they are made again from the examples."""


class NotFittedError(ValueError, AttributeError):
    """`fit` was not called."""


class FewShotClassifier:
    """Learns classes from a few pictures each, by what a run of metarun has learned.

    It has scikit-learn's protocol: `get_params`, `set_params` and pickling, so it can be cloned,
    put into pipelines and cross-validated. A pickle holds the examples and the path of the run,
    which must still be there. Threads may use one or several classifiers of a run at the same time:
    they take turns.

    Args:
        run: a run directory of `metarun train` (its best checkpoint), or a checkpoint file.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch: pictures that are labelled together; None: as many as in an evaluation of the run.
        calibrate: calibrate probabilities by validation tasks of the run, whose data must be
            there, as `metarun predict calibrate=true` does. What was found out is kept in the
            cache.
        coverage: how often the true label is to be in the set of `predict_set`; it goes with
            `calibrate`.
        calibration_tasks: how many validation tasks; likewise.
        data_root: folder of data sets, or that of the run's data=folder; None: `METARUN_DATA`, or
            that of training.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: numbers in an input of the network.

    Example:
        >>> import metarun
        >>> classifier = metarun.FewShotClassifier("outputs/train/mine")
        >>> _ = classifier.fit(["cat1.png", "dog1.png", "dog2.png"], ["cat", "dog", "dog"])
        >>> classifier.predict(["new.png"])
        array(['cat'], dtype='<U3')
    """

    _estimator_type = "classifier"  # for scikit-learn before 1.6

    def __init__(
        self,
        run: str | Path,
        device: str = "auto",
        batch: int | None = None,
        calibrate: bool = False,
        coverage: float = PredictConfig.coverage,
        calibration_tasks: int = PredictConfig.calibration_tasks,
        data_root: str | None = None,
    ) -> None:
        self.run = run
        self.device = device
        self.batch = batch
        self.calibrate = calibrate
        self.coverage = coverage
        self.calibration_tasks = calibration_tasks
        self.data_root = data_root

    def fit(self, images: Any, labels: Any) -> "FewShotClassifier":
        """Adapt to examples of two classes or more, in any order and of any number each.

        Args:
            images: pictures: paths, PIL images, uint8 arrays or tensors of any size, or
                floating-point inputs of the network (see `metarun.inference.examples`).
            labels: one for each, of any type that can be sorted.

        Raises:
            ValueError: the images are none, the labels are not as many, or all the same, or one is
                None or NaN.
            ConfigError: there is no such run, it has not learned from pictures, its network tells
                another number of classes apart, or it cannot be calibrated for such examples.
            DataError: a file cannot be read, or the data of the run to calibrate by are missing.
        """
        _check_numbers(self.coverage, self.calibration_tasks, self.batch, self.calibrate)
        names = np.asarray(labels)
        if names.ndim != 1:
            raise ValueError(f"labels have the shape {names.shape}: give one for each picture")
        as_given = np.asarray(labels, dtype=object)  # among texts NaN would become one
        if missing := [place for place, one in enumerate(as_given) if _is_missing(one)]:
            raise ValueError(f"labels[{missing[0]}] is None or NaN: leave out what has no label")
        self.classes_, targets = np.unique(names, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"labels have {len(self.classes_)} class{'es' * (len(self.classes_) == 0)}: give "
                "examples of two or more"
            )
        trained = self._trained()
        examples = to_examples(images, inputs_of_run(trained))
        if len(examples) != len(targets):
            raise ValueError(f"there are {len(examples)} images and {len(targets)} labels")
        self.examples_: NDArray[Any] = examples.to(dtype_of(trained.config)).numpy()
        self.targets_: NDArray[np.int64] = targets.astype(np.int64)
        self.n_features_in_ = int(np.prod(examples.shape[1:]))
        self._judgement = self._judged(trained)
        self._predict = self._adapted(trained)
        return self

    def predict_proba(self, images: Any) -> NDArray[np.float64]:
        """The probability of each class, (images, classes), in the order of `classes_`.

        With `calibrate`, it is that of scores divided by the temperature.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: the images are none.
            DataError: a file cannot be read.
            RunError: the adapted network gives no finite scores.
        """
        scores = self._scores(images)
        if self._judgement is None:
            found = scores.softmax(1)
        else:
            found = self._judgement.calibration.probabilities(scores)
        probabilities: NDArray[np.float64] = found.numpy()
        return probabilities

    def predict_set(self, images: Any) -> list[NDArray[Any]]:
        """The labels of each picture among which the true one is with the probability `coverage`.

        That is as `metarun predict` has it in its column `set`: over new tasks, and as far as these
        classes are to the run's data what its validation classes are. A set may be empty.

        Raises:
            ValueError: the classifier is not calibrated.
            NotFittedError, ValueError, DataError, RunError: as `predict_proba`.
        """
        if not self.calibrate:
            raise ValueError(
                "sets of labels take a calibration: FewShotClassifier(run, calibrate=True), fitted "
                "again"
            )
        scores = self._scores(images)
        assert self._judgement is not None
        inside = self._judgement.calibration.sets(scores, self.coverage).numpy()
        return [self.classes_[row] for row in inside]

    def predict(self, images: Any) -> NDArray[Any]:
        """The most probable class of each picture. Raises as `predict_proba`."""
        places = self.predict_proba(images).argmax(1)
        labels: NDArray[Any] = self.classes_[places]
        return labels

    def score(self, images: Any, labels: Any) -> float:
        """The accuracy on labelled pictures. Raises as `predict_proba`."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return {name: getattr(self, name) for name in _parameters()}

    def set_params(self, **params: Any) -> "FewShotClassifier":
        """Change arguments of `__init__`; fit again afterwards.

        Raises:
            ValueError: there is no such argument.
        """
        for name, value in params.items():
            if name not in _parameters():
                raise ValueError(
                    f"FewShotClassifier has no parameter {name!r}: choose from "
                    f"{', '.join(_parameters())}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"FewShotClassifier({shown})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in NOT_PICKLED}

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "examples_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            transformer_tags=None,
            regressor_tags=None,
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=True, three_d_array=True, string=True),
        )

    def _scores(self, images: Any) -> Tensor:
        """Scores of pictures, float64 (images, classes)."""
        if not self.__sklearn_is_fitted__():
            raise NotFittedError("this FewShotClassifier knows no classes yet: call fit first")
        trained = self._trained()
        if getattr(self, "_predict", None) is None:  # it came out of a pickle
            self._judgement = self._judged(trained)
            self._predict = self._adapted(trained)
        examples = to_examples(images, inputs_of_run(trained))
        found = torch.empty(len(examples), len(self.classes_), dtype=torch.float64)
        for places in batches_of(len(examples), self.batch or usual_batch(trained)):
            own = examples[list(places)].to(trained.setup.device, dtype_of(trained.config))
            found[list(places)] = checked(self._predict(own))
        return found

    def _judged(self, trained: Trained) -> Judgement | None:
        if not self.calibrate:
            return None
        counts = np.bincount(self.targets_, minlength=len(self.classes_)).tolist()
        unused = PredictConfig.false_alarms
        found = judge(trained, counts, self.calibration_tasks, self.coverage, unused)
        for words in too_few(found.calibration.seen, self.coverage):
            warnings.warn(words.strip(), stacklevel=4)
        return found

    def _trained(self) -> Trained:
        path = checkpoint.find(self.run)
        changed_at, way = path.stat().st_mtime_ns, len(self.classes_)
        root = self.data_root if self.calibrate else None
        return _loaded(path.absolute(), changed_at, self.device, way, self.calibrate, root)

    def _adapted(self, trained: Trained) -> Any:
        x = torch.from_numpy(self.examples_).to(trained.setup.device)
        y = torch.from_numpy(self.targets_).to(trained.setup.device)
        return trained.adapt(x, y, len(self.classes_))


@lru_cache(maxsize=4)
def _loaded(
    path: Path, changed_at: int, device: str, way: int, with_data: bool, root: str | None
) -> Trained:
    """A run is loaded once for all clones of a classifier, and again if its file has changed."""
    asked = EvalConfig(str(path), device=device, data=EvalData(root=root))
    return load(path, device, way, lambda own: changed(own, asked), with_data)


def _check_numbers(coverage: float, tasks: int, batch: int | None, calibrate: bool) -> None:
    """Refuse what `metarun predict` refuses, and a batch of no pictures.

    Raises:
        ConfigError: says what may be given.
    """
    if batch is not None:
        at_least("batch", batch, 1)
    PredictConfig(
        *("run", "support", "query"),
        calibrate=calibrate,
        coverage=coverage,
        calibration_tasks=tasks,
    )


def _is_missing(label: Any) -> bool:
    return label is None or (isinstance(label, float | np.floating) and bool(label != label))


def _parameters() -> list[str]:
    return [name for name in inspect.signature(FewShotClassifier).parameters]
