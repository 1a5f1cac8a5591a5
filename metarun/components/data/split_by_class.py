"""The split of a data set that has none: its classes, at random by a seed."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import field

from metarun.config.checks import between
from metarun.config.component import settings
from metarun.errors import ConfigError

ALL_IN_THE_TEST = [0, 0, 1]


@settings
class SplitConfig:
    """How classes are split where the data do not say it."""

    name: str = "???"
    split_seed: int = 0  # of the split by class, where the data have none
    fractions: list[float] = field(default_factory=lambda: [0.64, 0.16, 0.2])  # of that split

    def __post_init__(self) -> None:
        between("data.split_seed", self.split_seed, 0, 2**63 - 1)
        parts = self.fractions
        whole = parts == ALL_IN_THE_TEST
        above = len(parts) == 3 and all(0 < part < 1 for part in parts)
        if not whole and (not above or abs(sum(parts) - 1) > 1e-6):
            raise ConfigError(
                f"data.fractions={parts}: must be three numbers above 0 whose sum is 1, for "
                "training, validation and test; or [0,0,1], for an evaluation on all classes"
            )


def splits_of(
    names: Sequence[str], own: SplitConfig, given: dict[str, list[int]] | None
) -> dict[str, list[int]]:
    """The split that the data say, if they say one; but all classes in the test where asked.

    Args:
        names: of the classes.
        own: the settings.
        given: the numbers of the classes of each split; None: the data say none.

    Raises:
        ConfigError: as `split_by_class`.
    """
    if given is None or own.fractions == ALL_IN_THE_TEST:
        return split_by_class(names, own)
    return given


def is_split_by_class(classes: Mapping[str, Sequence[str]], own: SplitConfig) -> bool:
    """Whether classes are split as the settings say, and not as their data do.

    Args:
        classes: the names of those of each split.
        own: the settings.
    """
    names = [name for split in classes.values() for name in split]
    if len(names) < 3 and own.fractions != ALL_IN_THE_TEST:
        return False
    wanted = split_by_class(names, own)
    found = {split: {names[number] for number in numbers} for split, numbers in wanted.items()}
    return found == {split: set(own) for split, own in classes.items()}


def split_by_class(names: Sequence[str], own: SplitConfig) -> dict[str, list[int]]:
    """Classes split at random by `own.split_seed`.

    The order is by a hash of the name in its composed Unicode form, so that neither the order of
    the names nor the file system that they are on can change the split. The numbers of classes for
    validation and test are rounded, and 1 at least.

    Args:
        names: of the classes.
        own: the seed, and the fractions for training, validation and test.

    Returns:
        The numbers of the classes of "train", "val" and "test", sorted; of "test" alone, where
        all are in it.

    Raises:
        ConfigError: there are fewer than three classes.
    """
    if own.fractions == ALL_IN_THE_TEST:
        return {"test": list(range(len(names)))}
    if len(names) < 3:
        raise ConfigError(
            f"the data have {len(names)} classes and no split: training, validation and test need "
            "one or more each; data.fractions=[0,0,1] is for an evaluation on all of them"
        )

    def rank(number: int) -> str:
        name = unicodedata.normalize("NFC", names[number])
        return hashlib.sha256(f"{own.split_seed}:{name}".encode(errors="replace")).hexdigest()

    order = sorted(range(len(names)), key=rank)
    val, test = (max(1, round(part * len(names))) for part in own.fractions[1:])
    train = max(1, len(names) - val - test)
    cuts = {"train": (0, train), "val": (train, train + val), "test": (train + val, len(order))}
    return {part: sorted(order[start:stop]) for part, (start, stop) in cuts.items()}
