"""learn2learn's data sets: the pictures, classes and splits that its own tasksets have."""

import hashlib
import importlib.util
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learn2learn.vision import benchmarks, datasets
from PIL import Image
from torchvision.datasets import Omniglot

from metarun.components.data.l2l import BENCHMARKS, SPLITS, L2lDataConfig, found, inputs, load
from metarun.episodes.store import ClassStore
from metarun.errors import ConfigError, DataError

CLASSES, EACH = 3, 4  # of each split

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))


def pixels(side: int, seed: int) -> np.ndarray[Any, Any]:
    shape = (CLASSES * EACH, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def labels() -> list[int]:
    """Mixed, as they may lie in a file."""
    return [int(n) for n in np.random.default_rng(9).permutation(np.arange(CLASSES).repeat(EACH))]


def write_pickle(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def write_mini(root: Path) -> None:
    for seed, split in enumerate(SPLITS.values()):
        of_class = {f"n{seed}{c}": [i for i, n in enumerate(labels()) if n == c] for c in (2, 0, 1)}
        content = {"image_data": pixels(84, seed), "class_dict": of_class}
        write_pickle(root / f"mini-imagenet-cache-{split}.pkl", content)


def write_tiered(root: Path) -> None:
    for seed, split in enumerate(SPLITS):
        folder, coded = root / "tiered-imagenet", []
        for place, image in enumerate(pixels(84, seed)):
            folder.mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / "one.png")
            coded.append(np.frombuffer((folder / "one.png").read_bytes(), np.uint8))
            assert place == len(coded) - 1
        write_pickle(folder / f"{split}_images_png.pkl", coded)
        write_pickle(folder / f"{split}_labels.pkl", {"label_specific": np.array(labels())})


def write_fc100(root: Path) -> None:
    for seed, split in enumerate(SPLITS):
        content = {"data": pixels(32, seed), "labels": labels()}
        write_pickle(root / f"FC100_{split}.pickle", content)


def write_cifarfs(root: Path) -> None:
    for seed, split in enumerate(SPLITS):
        for number, image in enumerate(pixels(32, seed)):
            folder = root / "cifarfs" / "processed" / split / f"{split}{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")


WRITERS: dict[str, Callable[[Path], None]] = {
    "mini-imagenet": write_mini,
    "tiered-imagenet": write_tiered,
    "fc100": write_fc100,
    "cifarfs": write_cifarfs,
}


def by_class(items: Any) -> dict[int, set[bytes]]:
    """Class -> its pictures, as learn2learn gives them, from 0 to 1."""
    told: dict[int, set[bytes]] = {}
    for image, label in items:
        values = image / 255 if image.max() > 1 else image
        told.setdefault(int(label), set()).add(values.float().numpy().round(6).tobytes())
    return told


def by_class_here(store: ClassStore) -> list[set[bytes]]:
    told = []
    for start, size in zip(store.starts.tolist(), store.sizes.tolist(), strict=True):
        values = store.images[start : start + size].float() / 255
        told.append({image.numpy().round(6).tobytes() for image in values})
    return told


@pytest.mark.parametrize("benchmark", WRITERS)
def test_the_splits_have_the_pictures_and_classes_of_the_tasksets(
    benchmark: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    WRITERS[benchmark](root)
    before = sorted(root.rglob("*"))
    stores = load(L2lDataConfig(benchmark=benchmark, root=str(root)))
    assert sorted(root.rglob("*")) == before, "nothing is written to the user's folder"
    theirs = benchmarks.get_tasksets(benchmark, root=str(root))
    for store, taskset in zip(stores.values(), theirs, strict=True):
        wanted = by_class(taskset.dataset[i] for i in range(len(taskset.dataset)))
        assert by_class_here(store) == [wanted[c] for c in sorted(wanted)]
        assert store.images.shape[1:] == (3, *[BENCHMARKS[benchmark].side] * 2)
    names = [name for store in stores.values() for name in store.class_names]
    assert len(set(names)) == len(names), "no class is in two splits"
    assert inputs(L2lDataConfig(benchmark=benchmark)).shape == tuple(store.images.shape[1:])
    if benchmark == "mini-imagenet":
        assert stores["train"].class_names == ("n02", "n00", "n01")


@pytest.fixture
def omniglot_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """1623 characters with a small drawing each, and zips of the digests that are looked for."""
    home = tmp_path / "data" / "omniglot-py"
    rng, digests = np.random.default_rng(0), {}
    for part, counts in (("background", [32] * 30 + [4]), ("evaluation", [33] * 19 + [32])):
        for alphabet, count in enumerate(counts):
            for number in range(count):
                folder = home / f"images_{part}" / f"{part}{alphabet}" / f"character{number:02}"
                folder.mkdir(parents=True)
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / "1.png")
        (home / f"images_{part}.zip").write_bytes(part.encode())
        digests[f"images_{part}"] = hashlib.md5(part.encode()).hexdigest()
    monkeypatch.setattr(Omniglot, "zips_md5", digests)
    return home.parent


def test_omniglot_has_the_split_that_learn2learn_shuffles(omniglot_root: Path) -> None:
    given = L2lDataConfig(root=str(omniglot_root), split_seed=7, rotations=False)
    stores = load(given)
    random.seed(7)
    theirs = benchmarks.get_tasksets("omniglot", root=str(omniglot_root))
    data = theirs.train.dataset.dataset  # all characters
    names = [name for part in data.dataset.dataset.datasets for name in part._characters]
    for (split, store), taskset in zip(stores.items(), theirs, strict=True):
        assert {*store.class_names} == {names[c] for c in taskset.dataset.labels}, split
    place = stores["val"].class_names[5]
    image, label = data[names.index(place)]
    assert names[label] == place
    start = int(stores["val"].starts[5])
    ours = stores["val"].images[start].float() / 255
    torch.testing.assert_close(ours, image, rtol=0, atol=1e-6)
    turned = load(L2lDataConfig(root=str(omniglot_root), split_seed=7))
    assert [len(store.class_names) for store in turned.values()] == [4400, 400, 1692]
    other = load(L2lDataConfig(root=str(omniglot_root), split_seed=8, rotations=False))
    assert other["train"].class_names != stores["train"].class_names


def test_what_was_converted_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fc100(tmp_path)
    own = L2lDataConfig(benchmark="fc100", root=str(tmp_path))
    first = load(own)
    monkeypatch.setattr(datasets, "FC100", None)
    again = load(own)
    assert all(torch.equal(first[split].images, again[split].images) for split in SPLITS)
    os.utime(tmp_path / "FC100_val.pickle", (1, 1))
    with pytest.raises(DataError, match="learn2learn cannot read"):
        load(own)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    write_fc100(tmp_path)
    write_pickle(tmp_path / "FC100_train.pickle", {"data": Hostile(tmp_path / "made")})
    with pytest.raises(DataError, match=r"FC100_train\.pickle"):
        load(L2lDataConfig(benchmark="fc100", root=str(tmp_path)))
    assert not (tmp_path / "made").exists()


def test_what_is_missing_or_damaged_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = L2lDataConfig(benchmark="mini-imagenet", root=str(tmp_path))
    with pytest.raises(DataError, match=r"has no mini-imagenet-cache-train\.pkl.*get_tasksets\('m"):
        load(own)
    write_mini(tmp_path)
    assert found(own).count(".pkl") == 3
    write_pickle(tmp_path / "mini-imagenet-cache-train.pkl", {"nothing": 1})
    with pytest.raises(DataError, match="learn2learn cannot read"):
        load(own)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="data=l2l needs learn2learn, which is not installed"):
        load(own)
