"""Lake's 20 runs: found, paired and preprocessed as they should be; refused where they have no use.

The runs of these tests are drawn; the real ones confirm the pairs by a published figure.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from metarun.components.data._lake_files import find, list_drawings
from metarun.components.data.l2l import L2lDataConfig
from metarun.components.data.lake import LakeConfig, LakeRuns, has_seen, load
from metarun.components.data.omniglot import OmniglotConfig, shrink
from metarun.errors import ConfigError, DataError
from metarun.training.domain import episodes_of
from tests.cli.test_domains import TINY
from tests.conftest import Metarun

CPU = torch.device("cpu")
SIDE = 105


def pairing(run: int) -> list[int]:
    """The class of each test item, another order in each run."""
    return [int(own) for own in np.random.default_rng(run).permutation(20)]


def drawing(run: int, own: int, of_test: bool) -> bytes:
    """Black ink on white: a bar at the place of the class, as long as the run's number."""
    pixels = np.full((SIDE, SIDE), 255, dtype=np.uint8)
    pixels[5 * own : 5 * own + 4, 10 : 30 + run + of_test] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


def files() -> dict[str, bytes]:
    """All files of the runs by their paths in the zip."""
    found = {}
    for run in range(1, 21):
        lines = []
        for item, own in enumerate(pairing(run)):
            test = f"run{run:02}/test/item{item + 1:02}.png"
            training = f"run{run:02}/training/class{own + 1:02}.png"
            lines.append(f"{test} {training}\n")
            found[test], found[training] = drawing(run, own, True), drawing(run, own, False)
        found[f"run{run:02}/class_labels.txt"] = "".join(lines).encode()
    return found


def pack(path: Path, content: dict[str, bytes], prefix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(prefix + name, data)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    pack(root / "omniglot-one-shot" / "all_runs.zip", files())
    return root


def runs(root: Path) -> LakeRuns:
    return LakeRuns(load(LakeConfig(root=str(root))), seed=0, device=CPU, dtype=torch.float64)


def test_task_i_has_the_drawings_of_run_i_in_pairs(drawn: Path) -> None:
    episodes = runs(drawn).sample("test", 0, 20)
    assert episodes.support_x.shape == episodes.query_x.shape == (20, 20, 1, 28, 28)
    for run in range(20):
        for own in range(20):
            for found, of_test in ((episodes.support_x, False), (episodes.query_x, True)):
                wanted = torch.frombuffer(
                    bytearray(shrink(drawing(run + 1, own, of_test))), dtype=torch.uint8
                )
                assert torch.equal((found[run, own].flatten() * 255).round().byte(), wanted)
    assert episodes.support_y.tolist() == episodes.query_y.tolist() == [list(range(20))] * 20
    part = runs(drawn).sample("test", 7, 2)
    assert torch.equal(part.query_x, episodes.query_x[7:9])


@pytest.mark.parametrize("layout", ["root", "nested", "folder", "unpacked", "all_runs"])
def test_every_layout_gives_the_same(drawn: Path, tmp_path: Path, layout: str) -> None:
    if layout == "root":
        pack(tmp_path / "all_runs.zip", files())
    elif layout == "nested":
        pack(tmp_path / "all_runs.zip", files(), prefix="all_runs/")
    else:
        inner = {"folder": "omniglot-one-shot", "unpacked": ".", "all_runs": "all_runs"}[layout]
        for name, data in files().items():
            path = tmp_path / inner / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    one, other = (load(LakeConfig(root=str(root))) for root in (tmp_path, drawn))
    assert one.identity == other.identity


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)Lake's runs are not in .*all_runs\.zip"):
        load(LakeConfig(root=str(tmp_path)))
    path = tmp_path / "all_runs.zip"
    whole = files()
    pack(path, {name: data for name, data in whole.items() if not name.startswith("run20")})
    with pytest.raises(DataError, match=r"has no run20/class_labels\.txt"):
        load(LakeConfig(root=str(tmp_path)))
    twice = whole["run03/class_labels.txt"].replace(b"item02", b"item01")
    pack(path, whole | {"run03/class_labels.txt": twice})
    with pytest.raises(DataError, match=r"run03/class_labels\.txt does not pair 20 test drawings"):
        load(LakeConfig(root=str(tmp_path)))
    pack(path, whole | {"run04/test/item05.png": b"no picture"})
    with pytest.raises(DataError, match=r"is damaged \(run04/test/item05\.png\)"):
        load(LakeConfig(root=str(tmp_path)))
    pack(path, {name: data for name, data in whole.items() if name != "run04/test/item05.png"})
    with pytest.raises(DataError, match="is damaged"):
        load(LakeConfig(root=str(tmp_path)))
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="is damaged"):
        load(LakeConfig(root=str(tmp_path)))
    assert find(tmp_path / "nowhere") is None


def test_there_are_no_other_tasks(drawn: Path) -> None:
    source = runs(drawn)
    for split, start in (("train", 0), ("test", 20)):
        with pytest.raises(ConfigError, match="data=lake has 20 tasks"):
            source.sample(split, start, 1)
    assert episodes_of("lake", source, "test", None) == 20
    with pytest.raises(ConfigError, match="episodes=19: data=lake has 20 tasks"):
        episodes_of("lake", source, "test", 19)
    with pytest.raises(ConfigError, match="split=val: data=lake has only a test split"):
        episodes_of("lake", source, "val", None)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def nearest_error(root: Path) -> float:
    """The error of the nearest neighbour of pixels in %, from the files alone."""
    wrong = 0
    with zipfile.ZipFile(root / "omniglot-one-shot" / "all_runs.zip") as archive:

        def pixels(name: str) -> NDArray[np.int64]:
            return np.frombuffer(shrink(archive.read(name)), dtype=np.uint8).astype(np.int64)

        for run in range(1, 21):
            for line in archive.read(f"run{run:02}/class_labels.txt").decode().split("\n"):
                if not line.strip():
                    continue
                test, right = line.split()
                distances = {
                    (name := f"run{run:02}/training/class{own:02}.png"): int(
                        ((pixels(test) - pixels(name)) ** 2).sum()
                    )
                    for own in range(1, 21)
                }
                wrong += min(distances, key=distances.__getitem__) != right
    return wrong / 4


def test_the_runs_from_the_command_line(metarun: Metarun, drawn: Path, tmp_path: Path) -> None:
    where = f"data.root={drawn}"
    done = metarun("train", "data=lake", where, code=2)
    assert "data=lake has only a test split: train on other data" in done.stderr
    small = ("data=glyphs", "task.way=5", "task.query=2", *TINY)
    metarun("train", "algo=nearest_neighbour", *small, "hydra.run.dir=run")
    asked = ("eval", "ckpt=run", "data=lake", where)
    for change, words in {
        "episodes=21": "episodes=21: data=lake has 20 tasks; leave it out",
        "task.way=5": "the tasks of data=lake are fixed, with task.way=20; leave it out",
    }.items():
        done = metarun(*asked, change, "hydra.run.dir=no", code=2)
        assert words in done.stderr, done.stderr
    done = metarun(*asked, "hydra.run.dir=lake")
    test = result(tmp_path / "lake")["test"]
    assert test["episodes"] == 20 and (test["way"], test["shot"], test["query"]) == (20, 1, 1)
    assert test["error"] == pytest.approx(1 - test["accuracy"])
    assert 100 * test["error"] == pytest.approx(nearest_error(drawn))
    assert f"error {100 * test['error']:.2f} %" in done.stdout
    assert "20 tasks, 20-way 1-shot within a group, 1 queries a class" in done.stdout
    assert "seen_in_training" not in test
    metarun("train", "algo=maml", *small, "hydra.run.dir=five")
    done = metarun("eval", "ckpt=five", "data=lake", where, "hydra.run.dir=no", code=2)
    assert "task.way=20: the checkpoint's network tells 5 classes apart" in done.stderr
    done = metarun("data", "check", "lake", where)
    assert "test: 400 classes" in done.stdout


def test_a_run_that_has_seen_the_alphabets_is_told_so() -> None:
    assert has_seen(OmniglotConfig()) and has_seen(OmniglotConfig(split="vinyals"))
    assert not has_seen(OmniglotConfig(split="background")) and not has_seen(LakeConfig())
    assert not has_seen(OmniglotConfig(split="background_small1"))
    assert has_seen(L2lDataConfig()) and not has_seen(L2lDataConfig(benchmark="fc100"))


def modified_hausdorff(one: cKDTree, other: cKDTree) -> float:
    """Dubuisson and Jain 1994: the larger mean distance to the nearest point of the other set."""
    return max(float(a.query(b.data)[0].mean()) for a, b in ((one, other), (other, one)))


def ink(png: bytes) -> cKDTree:
    """The places of black pixels around their centre."""
    with Image.open(io.BytesIO(png)) as image:
        places = np.argwhere(np.asarray(image.convert("L")) < 128).astype(float)
    return cKDTree(places - places.mean(0))


def test_the_real_runs_give_the_published_error_of_a_baseline(real_data: Path) -> None:
    """Lake's demo: the modified Hausdorff distance of the drawings has an error of 38.8 %.

    Read through the same pairs as `data=lake`, so that a wrong pair would be seen.
    """
    path = real_data / "omniglot-one-shot" / "all_runs.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    drawings = list_drawings(path)
    with zipfile.ZipFile(path) as archive:
        points = [ink(archive.read(drawing.member)) for drawing in drawings]
    wrong = 0
    for run in range(20):
        training, test = (points[40 * run + place : 40 * run + 40 : 2] for place in (0, 1))
        for own, item in enumerate(test):
            distances = [modified_hausdorff(item, example) for example in training]
            wrong += int(np.argmin(distances)) != own
    assert wrong / 4 == pytest.approx(38.8, abs=0.06)
