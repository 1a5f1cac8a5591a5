"""Predictions as files: a table, and a sheet of the pictures."""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

from metarun.errors import ConfigError, RunError
from metarun.inference.judgement import COLUMNS
from metarun.inference.predict import Predictions
from metarun.inference.sheet import sheet_of, write_sheet
from metarun.system.files import write_atomically

log = logging.getLogger(__name__)

FIRST_COLUMNS = ("path", "label", "probability")


def to_csv(predictions: Predictions) -> str:
    """A line for each picture: its path, its label, its probability, and that of each class.

    With a judgement, what it says of each stands before the classes. A class that is called as one
    of the other columns has p(…) around its name.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    judged = predictions.judged or [[]] * len(predictions.paths)
    more = COLUMNS if predictions.judged else ()
    others = (*FIRST_COLUMNS, *more)
    writer.writerow([*others, *_class_columns(predictions.class_names, others)])
    rows = zip(
        predictions.paths, predictions.labels, judged, predictions.probabilities, strict=True
    )
    for path, label, told, row in rows:
        writer.writerow([path, label, repr(float(row.max())), *told, *map(repr, row.tolist())])
    return text.getvalue()


def _class_columns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """What the columns of classes are called: no two columns have the same name."""
    taken, columns = {*others, *names}, []
    for name in names:
        column = name
        while column in others or (column != name and column in taken):
            column = f"p({column})"
        taken.add(column)
        columns.append(column)
    return columns


def refuse_foreign(path: Path) -> None:
    """Refuse to overwrite a file that is no table of predictions.

    Raises:
        ConfigError: there is one.
    """
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder: name a file, e.g. out=predictions.csv")
    if path.exists():
        with open(path, "rb") as file:
            if not file.read(100).startswith(",".join(FIRST_COLUMNS).encode()):
                raise ConfigError(f"{path} is no table of predictions: choose another out=")


def write_csv(path: Path, predictions: Predictions) -> None:
    """Write the table.

    Raises:
        RunError: it cannot be written.
    """
    try:
        # Names of files need not be text: such bytes are written as they are.
        content = to_csv(predictions).encode(errors="surrogateescape")
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose out=…") from error


def write_sheet_of(path: Path, predictions: Predictions) -> None:
    """Draw the first pictures with their labels.

    Raises:
        RunError: it cannot be written.
    """
    best = predictions.probabilities.amax(1).tolist()
    captions = [
        [label, f"{100 * probability:.0f} %  {Path(name).name}"]
        for label, probability, name in zip(
            predictions.labels, best, predictions.paths, strict=True
        )
    ][: len(predictions.pixels)]
    if (left := len(predictions.paths) - len(captions)) > 0:
        log.info("%s shows the first %d pictures, and %d others not", path, len(captions), left)
    try:
        write_sheet(path, sheet_of(predictions.pixels, captions))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; choose sheet=…") from error
