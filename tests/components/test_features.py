"""Features that were computed before: from which files, and what methods make of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from metarun.components.data.features import FeaturesConfig, found, load
from metarun.errors import ConfigError, DataError, MetarunError
from tests.setups import setup_of

CLASSES, EACH, WIDTH = 20, 8, 5


def drawn() -> dict[str, Any]:
    """Examples in random order; each tells its class by its first number."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), EACH))
    values = rng.normal(size=(len(labels), WIDTH)).astype(np.float32)
    values[:, 0] = labels
    return {"features": values, "labels": labels}


def write(path: Path, **changes: Any) -> str:
    arrays = {k: v for k, v in (drawn() | changes).items() if v is not None}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_each_example_is_in_its_class(suffix: str, tmp_path: Path) -> None:
    own = FeaturesConfig(root=write(tmp_path / f"file{suffix}"))
    stores = load(own)
    assert {split: len(store.class_names) for split, store in stores.items()} == {
        "train": 13, "val": 3, "test": 4,
    }  # fmt: skip
    seen = []
    for store in stores.values():
        assert store.images.dtype == torch.float32 and store.sizes.tolist() == [EACH] * len(
            store.class_names
        )
        for name, start, size in zip(store.class_names, store.starts, store.sizes, strict=True):
            assert (store.images[start : start + size, 0] == float(name)).all()
            seen.append(int(name))
    assert sorted(seen) == list(range(CLASSES))
    assert found(own) == f"{CLASSES * EACH} examples of {WIDTH} numbers"
    other = FeaturesConfig(root=own.root, split_seed=1)
    assert load(other)["test"].class_names != stores["test"].class_names


@pytest.mark.parametrize("numbers", [False, True])
def test_a_split_of_the_file_counts(numbers: bool, tmp_path: Path) -> None:
    part = np.array([0] * 10 + [1] * 4 + [2] * 6)[drawn()["labels"]]
    split = part if numbers else np.array(["train", "val", "test"])[part]
    words = np.array([f"class {label:02}" for label in drawn()["labels"]])
    own = FeaturesConfig(root=write(tmp_path / "file.npz", split=split, labels=words))
    names = {split: store.class_names for split, store in load(own).items()}
    assert names["val"] == ("class 10", "class 11", "class 12", "class 13")
    assert [len(n) for n in names.values()] == [10, 4, 6]


def test_half_and_double_precision(tmp_path: Path) -> None:
    for kind, kept in ((np.float16, torch.float32), (np.float64, torch.float64)):
        values = drawn()["features"].astype(kind)
        stores = load(FeaturesConfig(root=write(tmp_path / "file.npz", features=values)))
        assert stores["train"].images.dtype is kept
    from safetensors.torch import save_file as save

    tensors = {name: torch.from_numpy(value) for name, value in drawn().items()}
    save(tensors | {"features": tensors["features"].bfloat16()}, tmp_path / "b.safetensors")
    assert load(FeaturesConfig(root=str(tmp_path / "b.safetensors")))["val"].count == 3 * EACH


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"labels": None}, "has no labels: it must have features"),
    "of images": ({"features": np.zeros((160, 3, 4, 4), np.float32)}, "must be floating-point"),
    "whole numbers": ({"features": np.zeros((160, 5), np.int64)}, "features are int64 of shape"),
    "too few labels": ({"labels": np.arange(9)}, r"labels are int64 of shape \(9,\)"),
    "one-hot labels": ({"labels": np.eye(160)}, r"labels are float64 of shape \(160, 160\)"),
    "not finite": ({"features": np.full((160, 5), np.nan)}, "features of example 0 .* not finite"),
    "objects": ({"labels": np.array([{}] * 160)}, "cannot be read: .*allow_pickle=False"),
    "an unknown split": ({"split": np.array(["dev"] * 160)}, "split has 'dev'"),
    "one split": ({"split": np.zeros(160, int)}, "the val split has no classes"),
    "a class in two": ({"split": np.arange(160) % 3}, "is in two splits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file_has_one_clear_message(fault: str, tmp_path: Path) -> None:
    changes, message = FAULTS[fault]
    root = write(tmp_path / "file.npz", **changes)
    with pytest.raises(DataError, match=message):
        load(FeaturesConfig(root=root))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for name, message in (
        ("nowhere.npz", "there is no such file"),
        ("table.csv", r"must end in \.npz or \.safetensors"),
        ("damaged.npz", "cannot be read"),
        ("damaged.safetensors", "cannot be read"),
    ):
        if name != "nowhere.npz":
            (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(DataError, match=message):
            load(FeaturesConfig(root=str(tmp_path / name)))
    with pytest.raises(ConfigError, match=r"not given: data\.root="):
        load(FeaturesConfig())
    few = {"features": np.zeros((4, 2), np.float32), "labels": np.array([0, 0, 1, 1])}
    with pytest.raises(ConfigError, match="2 classes and no split"):
        load(FeaturesConfig(root=write(tmp_path / "few.npz", **few)))


def command(root: str, *settings: str) -> tuple[str, ...]:
    return (
        "data=features", f"data.root={root}", "backbone=identity", "engine.precision=float64",
        "engine.compile=none", "task.way=3", "task.shot=2", "task.query=3", *settings,
    )  # fmt: skip


def test_prototypes_are_those_of_numpy(tmp_path: Path) -> None:
    setup = setup_of(*command(write(tmp_path / "file.npz"), "algo=protonet"))
    assert setup.steps == 0 and setup.algorithm.init() == {}, "there is nothing to learn"
    tasks = setup.source.sample("test", 0, 20)
    assert tasks.support_x.shape == (20, 6, WIDTH) and tasks.support_x.dtype == torch.float64
    for task in range(20):
        one = type(tasks)(*(part[task] for part in tasks))
        means = one.support_x.numpy().reshape(3, 2, WIDTH).mean(1)
        distances = ((one.query_x.numpy()[:, None] - means) ** 2).sum(2)
        right = (distances.argmin(1) == one.query_y.numpy()).mean()
        assert float(setup.algorithm.trace({}, one).query_score) == pytest.approx(right)


@pytest.mark.parametrize("algo", ["r2d2", "metaoptnet", "baseline", "simpleshot", "maml", "anil"])
def test_methods_of_heads_work(algo: str, tmp_path: Path) -> None:
    setup = setup_of(*command(write(tmp_path / "file.npz"), f"algo={algo}"))
    tasks = setup.train_tasks.sample(0, 2)
    gradient, _ = setup.gradient(
        setup.algorithm.init(), tasks, torch.zeros((), dtype=torch.float64)
    )
    assert all(value.isfinite().all() for value in gradient.values())


def test_what_needs_images_or_has_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "file.npz")
    with pytest.raises(MetarunError, match="needs images"):
        setup_of(*command(root, "backbone=conv4"))
    with pytest.raises(MetarunError, match="is more than the 8 examples of class"):
        setup_of(*command(root, "task.query=9"))
    with pytest.raises(MetarunError, match=r"algo=proto_maml has nothing to learn.*no parameters"):
        setup_of(*command(root, "algo=proto_maml"))
