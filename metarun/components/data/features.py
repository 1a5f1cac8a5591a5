"""Features of examples that some network has computed before, and the labels of these."""

import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from metarun.components.data.images import image_episodes
from metarun.components.data.split_by_class import SplitConfig, splits_of
from metarun.config.checks import absolute
from metarun.config.component import builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_sizes, split_stores
from metarun.errors import ConfigError, DataError, first_line
from metarun.pictures.listing import SPLITS
from metarun.system.memory import machine_memory

NAMES = ("features", "labels", "split")
WANTED = "features (examples × numbers), labels (examples) and, if there is a split, split"

Arrays = dict[str, NDArray[np.generic]]


@settings
class FeaturesConfig(SplitConfig):
    """Features that were computed before (.npz or .safetensors), for backbone=identity or mlp."""

    own_root: ClassVar[bool] = True  # not the folder of all data sets

    root: str | None = None  # the file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = absolute(self.root)


@builds(FeaturesConfig)
def features(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: FeaturesConfig
) -> ImageEpisodes:
    """Episodes of the features: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, own=own)


@finds(FeaturesConfig)
def found(own: FeaturesConfig) -> str:
    """How many features there are."""
    arrays = _arrays(own)
    count, width = arrays["features"].shape
    return f"{count:,} examples of {width:,} numbers"


def load(own: FeaturesConfig) -> dict[str, ClassStore]:
    """The features of each split.

    Raises:
        ConfigError: no file is given, or it has too few classes.
        DataError: the file is missing, damaged, or does not have what it must.
    """
    arrays = _arrays(own)
    classes, owner = np.unique(arrays["labels"], return_inverse=True)
    order = np.argsort(owner, kind="stable")
    names = [str(name) for name in classes]
    values = torch.from_numpy(_as_floats(arrays["features"])[order])
    store = from_sizes(values, torch.from_numpy(np.bincount(owner)), names)
    given = _given(str(own.root), arrays["split"], owner, names) if "split" in arrays else None
    return split_stores(store, splits_of(names, own, given))


def _given(
    file: str, split: NDArray[np.generic], owner: NDArray[np.intp], names: list[str]
) -> dict[str, list[int]]:
    """The classes of each split, from the split of each example: a name, or 0, 1 and 2."""
    which = [SPLITS[n] if n in (0, 1, 2) else str(n) for n in np.unique(split).tolist()]
    if unknown := [name for name in which if name not in SPLITS]:
        raise DataError(
            f"{file}: split has {unknown[0]!r}; it may be {', '.join(SPLITS)} or 0, 1, 2"
        )
    found: dict[str, list[int]] = {name: [] for name in SPLITS}
    for value, name in zip(np.unique(split), which, strict=True):
        found[name] += np.unique(owner[split == value]).tolist()
    everywhere = [number for numbers in found.values() for number in numbers]
    for number in range(len(names)):
        if everywhere.count(number) > 1:
            raise DataError(
                f"{file}: class {names[number]!r} is in two splits: a few-shot split has other "
                "classes in each"
            )
    if empty := [name for name, numbers in found.items() if not numbers]:
        raise DataError(f"{file}: the {empty[0]} split has no classes")
    return found


def _arrays(own: FeaturesConfig) -> Arrays:
    """What the file has, each array of the shape that it must have."""
    if own.root is None:
        raise ConfigError("not given: data.root=<file of features, .npz or .safetensors>")
    path = Path(own.root)
    if not path.is_file():
        raise DataError(f"data.root={path}: there is no such file")
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise DataError(f"data.root={path}: must end in {' or '.join(readers)}")
    try:
        arrays = readers[path.suffix](path)
    except DataError:
        raise
    except Exception as error:  # damage has many types in these libraries
        raise DataError(f"{path} cannot be read: {first_line(error)[:200]}") from error
    for name in ("features", "labels"):
        if name not in arrays:
            raise DataError(f"{path} has no {name}: it must have {WANTED}")
    shape, labels = arrays["features"].shape, arrays["labels"]
    if len(shape) != 2 or 0 in shape or arrays["features"].dtype.kind != "f":
        raise DataError(
            f"{path}: features are {arrays['features'].dtype} of shape {shape}: they must be "
            "floating-point numbers, (examples, numbers)"
        )
    for name in {"labels", "split"} & arrays.keys():
        if arrays[name].shape != shape[:1] or arrays[name].dtype.kind not in "iuU":
            raise DataError(
                f"{path}: {name} are {arrays[name].dtype} of shape {arrays[name].shape}: they must "
                f"be whole numbers or words, ({shape[0]},)"
            )
    if not (finite := np.isfinite(arrays["features"]).all(1)).all():
        row = int(np.argmin(finite))
        raise DataError(f"{path}: features of example {row} ({labels[row]}) are not finite")
    return arrays


def _as_floats(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def _npz(path: Path) -> Arrays:
    """Arrays of NumPy; objects, which would be pickles, are refused."""
    with zipfile.ZipFile(path) as archive:
        size = sum(one.file_size for one in archive.infolist())
    if size > machine_memory():
        raise DataError(f"{path} would take {size / 2**30:.0f} GiB, more than there is memory")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in NAMES if name in file}


def _safetensors(path: Path) -> Arrays:
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in {*NAMES} & {*file.keys()}}
    # NumPy has no bfloat16.
    return {n: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for n, t in found.items()}
