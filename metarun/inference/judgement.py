"""How far to trust a run with a task of such a shape; found out once, by the data of the run."""

import hashlib
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.inference.calibrated import Calibration, calibrate
from metarun.inference.familiarity import Familiar, familiar, unfamiliarity
from metarun.inference.outcomes import outcomes, source_of
from metarun.inference.trained import Trained
from metarun.system import archive
from metarun.system.files import cache_dir, write_atomically

log = logging.getLogger(__name__)

VERSION = 3  # raise when the same run would be judged otherwise: it names the file


class Judgement(NamedTuple):
    """How far to trust a run.

    Attributes:
        calibration: of its scores, in tasks of the same classes and shots.
        compared: what pictures are compared with.
        coverage: what sets of labels are to cover.
        false_alarms: what fraction of known pictures may be called none of the classes.
    """

    calibration: Calibration
    compared: Familiar
    coverage: float
    false_alarms: float

    def columns(self, scores: Tensor, inputs: Tensor, names: Sequence[str]) -> list[list[str]]:
        """What a table says of each picture: its set of labels, "none" or not, how far it is."""
        sets = self.calibration.sets(scores, self.coverage).tolist()
        none = self.calibration.is_none(scores, self.false_alarms).tolist()
        far = unfamiliarity(inputs, self.compared).tolist()
        return [
            [
                joined([name for name, inside in zip(names, row, strict=True) if inside]),
                "none" if strange else "",
                f"{percent:.1f}",
            ]
            for row, strange, percent in zip(sets, none, far, strict=True)
        ]


def joined(names: Sequence[str]) -> str:
    """Labels as one text, with | between them; a | or a backslash within one has a backslash."""
    return "|".join(re.sub(r"([\\|])", r"\\\1", name) for name in names)


def labels_in(text: str) -> list[str]:
    """The labels of a text that `joined` has made of some."""
    found = re.findall(r"(?:\\.|[^\\|])+", text)
    return [re.sub(r"\\(.)", r"\1", name) for name in found]


COLUMNS = ("set", "none_of_these", "unfamiliarity")


def judge(
    trained: Trained,
    counts: Sequence[int],
    tasks: int,
    coverage: float,
    false_alarms: float,
) -> Judgement:
    """Judge a run by its validation tasks, of as many classes and shots as the support set has.

    What was found out is kept in the cache, by the content of the checkpoint.

    Args:
        trained: the run, with its data.
        counts: examples of each class.
        tasks: how many.

    Raises:
        ConfigError: the data have too few classes or pictures for such tasks.
    """
    path = _place(trained, counts, tasks)
    with suppress(Exception):  # what is not there, or is damaged, is made again
        found = archive.read(path)
        own = Calibration(*(found[field] for field in Calibration._fields))
        compared = Familiar(found["training"], found["distances"])
        return Judgement(own, compared, coverage, false_alarms)
    log.info("calibrating on %d validation tasks; kept for the next time", tasks)
    shaped = _shaped(trained, counts)
    own = calibrate(outcomes(shaped, "val", tasks, sorted(counts)))
    compared = familiar(source_of(trained.setup))
    content = archive.to_bytes(own._asdict() | compared._asdict())
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        log.warning("could not keep the calibration in %s (%s)", path, error)
    return Judgement(own, compared, coverage, false_alarms)


def _place(trained: Trained, counts: Sequence[int], tasks: int) -> Path:
    with open(trained.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    config = asdict(trained.config)
    config["data"].pop("root", None)
    told = (VERSION, torch.__version__, tasks, sorted(counts), config)
    digest.update(repr(told).encode(errors="surrogateescape"))
    return cache_dir() / f"calibration-{digest.hexdigest()[:16]}.safetensors"


def queries_left(trained: Trained, counts: Sequence[int]) -> int:
    """How many pictures a validation class has beside the examples of a task.

    Raises:
        ConfigError: there are none, or as `source_of`.
    """
    source, shot = source_of(trained.setup), max(counts)
    left = int(source.stores["val"].sizes.min()) - shot
    if left < 1:
        raise ConfigError(
            f"calibrate=true needs validation tasks of {shot} shots, and classes of the run's data "
            f"have {left + shot} pictures: give fewer examples of each class, or leave it out"
        )
    return left


def _shaped(trained: Trained, counts: Sequence[int]) -> Trained:
    """The run with validation tasks of other shots, and as many queries as that leaves."""
    source, left = source_of(trained.setup), queries_left(trained, counts)
    other = source.with_more_classes(0)
    other.shot, other.query = max(counts), min(source.query, left)
    return replace(trained, setup=replace(trained.setup, source=other))
