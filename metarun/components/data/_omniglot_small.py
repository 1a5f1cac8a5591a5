"""The two small background sets of Omniglot, which say themselves which alphabets they have.

Lake, Salakhutdinov and Tenenbaum 2015: five alphabets each, about as many as a grown person knows.
"""

from collections.abc import Sequence
from pathlib import Path

from metarun.components.data._omniglot_files import (
    FOLDER,
    Drawing,
    check_complete,
    part_in,
    places_below,
)
from metarun.components.data.splits import OMNIGLOT_EVALUATION, omniglot_names
from metarun.errors import DataError

CHARACTERS = {"background_small1": 136, "background_small2": 156}
ALPHABETS = 5  # of each


def find_small(root: Path, split: str) -> Path:
    """The folder of alphabets of a small set, or the zip of one.

    Raises:
        DataError: it is not there.
    """
    name = f"images_{split}"
    for folder in (root / FOLDER, root, *places_below(root)):
        if (found := part_in(folder, name)) is not None:
            return found
    raise DataError(
        f"data.split={split}: {root / FOLDER} has no {name}.zip, nor a folder of that name: it is "
        "in the folder python of the authors' repository, brendenlake/omniglot, and is not fetched"
    )


def check_small(drawings: Sequence[Drawing], part: Path, split: str) -> None:
    """As many alphabets and characters are there as there should be, and none that is for the test.

    Raises:
        DataError: says what is otherwise.
    """
    names = {drawing.character for drawing in drawings}
    check_complete(drawings, [part], sorted(names.intersection(omniglot_names())))
    alphabets = {name.split("/")[0] for name in names}
    if tested := sorted(alphabets.intersection(OMNIGLOT_EVALUATION)):
        raise DataError(f"{part} has {tested[0]}, which is of the evaluation set")
    if (len(alphabets), len(names)) != (ALPHABETS, CHARACTERS[split]):
        raise DataError(
            f"{part} has {len(names)} characters of {len(alphabets)} alphabets, not "
            f"{CHARACTERS[split]} of {ALPHABETS}: put a good copy in its place"
        )
