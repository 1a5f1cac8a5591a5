"""Lake's one-shot classification: 20 fixed tasks of Omniglot, for evaluation alone.

Each task has 20 characters of one alphabet of the evaluation set, one training drawing and one test
drawing of each, by two people.

References:
    Lake, Salakhutdinov and Tenenbaum 2015, Human-level concept learning through probabilistic
    program induction.
"""

from typing import Any, ClassVar

import torch

from metarun.components.data._data_root import home
from metarun.components.data._lake_files import RUNS, WAY, find, list_drawings, missing
from metarun.components.data.multi import MultiConfig, source_settings
from metarun.components.data.omniglot import convert
from metarun.config.checks import absolute
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import Episodes, ImageEpisodes
from metarun.episodes.store import ClassStore
from metarun.errors import ConfigError


@settings
class LakeConfig:
    """Lake's 20 fixed one-shot tasks within an alphabet; for metarun eval alone."""

    # The only shape that its tasks have.
    fixed_task: ClassVar[dict[str, Any]] = {"way": 20, "shot": 1, "query": 1, "within": "group"}
    usual: ClassVar[dict[str, dict[str, Any]]] = {"task": fixed_task}

    root: str | None = None  # folder of data sets; null: a cache folder of the user

    def __post_init__(self) -> None:
        self.root = absolute(self.root)


@builds(LakeConfig)
def lake(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: LakeConfig
) -> "LakeRuns":
    """The tasks, whatever `task` and `seed` say: there are no others."""
    return LakeRuns(load(own), seed=seed, device=device, dtype=dtype)


@finds(LakeConfig)
def found(own: LakeConfig) -> str:
    """Where the runs are."""
    root = home(own.root)
    if (part := find(root)) is None:
        raise missing(root)
    return str(part)


def load(own: LakeConfig) -> ClassStore:
    """The drawings of all runs, 28x28 and ink = 255, as those of `data=omniglot`.

    Returns:
        400 classes 'run01/class01' … of two images each, the training and the test drawing.

    Raises:
        DataError: the runs are missing, incomplete or damaged.
    """
    root = home(own.root)
    if (part := find(root)) is None:
        raise missing(root)
    return convert(list_drawings(part))


class LakeRuns(ImageEpisodes):
    """The 20 tasks: task `i` is run `i + 1`, whatever the seed.

    Attributes:
        tasks: how many tasks a split has, where their number is fixed.
        reports_error: results state the error beside the accuracy, as the literature does.
    """

    tasks: ClassVar[dict[str, int]] = {"test": RUNS}
    reports_error = True

    def __init__(
        self, store: ClassStore, *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """The tasks from what `load` gives."""
        super().__init__(
            {"test": store}, way=WAY, shot=1, query=1, seed=seed, device=device, dtype=dtype,
            within="group",
        )  # fmt: skip

    def sample(self, split: str, start: int, count: int) -> Episodes:
        """Runs `start + 1` … `start + count`: a support drawing and a query of each class.

        Raises:
            ConfigError: there is no such run.
        """
        if split != "test" or start + count > RUNS:
            raise ConfigError(f"data=lake has {RUNS} tasks, of a test split, and no others")
        store = self.stores["test"]
        first = torch.arange(start, start + count, device=store.sizes.device) * WAY
        classes = first[:, None] + torch.arange(WAY, device=store.sizes.device)
        starts = store.starts[classes]
        labels = torch.arange(WAY, device=self.device).expand(count, -1)
        support, query = (self.values(store.take(starts + place)) for place in (0, 1))
        return Episodes(support, labels, query, labels)

    def _identity_of(self, stores: dict[str, ClassStore]) -> str | None:
        return f"lake:{stores['test'].identity}"


def has_seen(data: Any) -> bool:
    """Whether data (their settings) train on characters of the runs' alphabets."""
    if isinstance(data, MultiConfig):
        return any(has_seen(source_settings(data, place)[0]) for place in range(len(data.sources)))
    if data.name == "l2l":
        return bool(data.benchmark == "omniglot")
    return bool(data.name == "omniglot" and not data.split.startswith("background"))
