"""The classes of published data sets and their splits, as `lists/<name>.txt` has them."""

import hashlib
from importlib.resources import files
from typing import NamedTuple

from metarun.errors import DataError


class ClassList(NamedTuple):
    """The classes of a data set.

    Attributes:
        splits: the names of the classes of "train", "val" and "test", in the order of the file;
            "superclass/class" where there are superclasses.
        words: what a class is called, by its name, where the name is a number.
    """

    splits: dict[str, list[str]]
    words: dict[str, str]


def class_list(name: str, sha256: str) -> ClassList:
    """The list in `lists/<name>.txt`: a class, its split, and perhaps its words in each line.

    Args:
        name: of the file.
        sha256: of its content, since another list would be another benchmark.

    Raises:
        DataError: it is another list.
    """
    content = (files(__package__) / "lists" / f"{name}.txt").read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"the list of classes lists/{name}.txt has been changed: install anew")
    found = ClassList({"train": [], "val": [], "test": []}, {})
    for line in content.decode().splitlines():
        if not line.startswith("#"):
            own, split, *words = line.split("\t")
            found.splits[split].append(own)
            if words:
                found.words[own] = words[0]
    return found
