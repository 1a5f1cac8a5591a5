"""No run goes on, and no checkpoint is evaluated, on other data than before without a word."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from metarun.components.data.sinusoid import Sinusoids
from metarun.episodes.cache import cached
from metarun.episodes.identity import brief_identity, identity_of, same_data, task_set
from metarun.episodes.store import ClassStore, from_equal_classes, from_sizes, select_classes
from metarun.episodes.store import with_rotations as rotated
from metarun.rundir import checkpoint
from tests.conftest import Metarun

PLUGIN = '''
"""A folder with a file of images, in twelve classes."""
from dataclasses import dataclass
from pathlib import Path
import torch
from metarun.components.build import register
from metarun.components.data.images import image_episodes
from metarun.episodes.store import from_equal_classes
from metarun.components.data.sinusoid import Sinusoids

@dataclass
class FolderConfig:
    name: str = "images"
    root: str = "here"

def load(root):
    images = torch.load(Path(root) / "images.pt")
    store = from_equal_classes(images, [f"class{i}" for i in range(len(images))])
    return {split: store for split in ("train", "val", "test")}

register("data", "images", FolderConfig, image_episodes(load))

@dataclass
class WavesConfig:
    name: str = "waves"
    root: str = "here"

class Waves(Sinusoids):
    """It says nothing of what it is."""

    def __init__(self, root, **options):
        super().__init__(**options)
        self.scale = float((Path(root) / "scale").read_text())

    def sample(self, split, start, count):
        drawn = super().sample(split, start, count)
        return drawn._replace(support_y=self.scale * drawn.support_y,
                              query_y=self.scale * drawn.query_y)

def build(task, seed, device, dtype, root):
    return Waves(root, shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype)

register("data", "waves", WavesConfig, build)
'''
TINY = (
    "train", "+plugins=[mine]", "backbone=mlp", "backbone.hidden=[4]", "trainer.steps=4",
    "trainer.eval_every=2", "trainer.checkpoint_every=2", "trainer.eval_episodes=3",
    "trainer.test_episodes=3", "trainer.meta_batch=2", "task.query=2",
    "hydra.run.dir=run",
)  # fmt: skip
WAY = {"images": ["task.way=2"], "waves": []}  # a regression has no classes
EVAL = ("eval", "ckpt=run", "+plugins=[mine]")


@pytest.fixture(params=["images", "waves"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The name of a data set, whose content is in the folder `here`, and another in `there`."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    for seed, name in enumerate(("here", "there")):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(256, (6, 8, 1, 3, 3), generator=generator, dtype=torch.uint8)
        torch.save(images, tmp_path / name / "images.pt")
        (tmp_path / name / "scale").write_text(str(1.0 + 0.01 * seed))
    name: str = request.param
    return name


def unfinish(run: Path) -> None:
    """Make a finished run one that was killed after meta-step 2."""
    (run / "checkpoints" / "step-00000002.safetensors").replace(
        run / "checkpoints" / "last.safetensors"
    )
    for name in (
        "checkpoints/step-00000004.safetensors",
        "checkpoints/best.safetensors",
        "status.json",
    ):
        (run / name).unlink()


def figures(tmp_path: Path, folder: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((tmp_path / folder / "result.json").read_text())["test"]
    return found


# Not of waves, whose identity is taken from episodes: these change with the seed.
@pytest.mark.parametrize("data", ["images"], indirect=True)
def test_a_report_keeps_runs_on_other_data_apart(
    metarun: Metarun, tmp_path: Path, data: str
) -> None:
    train = [*TINY[:-1], f"data={data}", *WAY[data]]
    for seed, folder in ((0, "here"), (1, "here"), (2, "there")):
        metarun(*train, f"seed={seed}", f"data.root={folder}", f"hydra.run.dir=runs/{seed}")
    said = metarun("report", "runs", "out=page").stdout
    assert said.count("data.content=sha256:") == 2 and "2 seeds" in said and "3 seeds" not in said


def test_a_run_does_not_go_on_with_other_data(metarun: Metarun, tmp_path: Path, data: str) -> None:
    train = [*TINY, f"data={data}", *WAY[data]]
    metarun(*train)
    before = figures(tmp_path, "run")
    done = metarun(*train, "data.root=there", code=2)
    assert "run holds a run on other data" in done.stderr and "in there now" in done.stderr
    unfinish(tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    done = metarun(*train, "data.root=there", code=2)
    assert "run holds a run on other data" in done.stderr and "nothing was changed" in done.stderr
    assert "give data.root=… with the folder of its data" in done.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == config
    assert not (tmp_path / "run" / "status.json").exists()
    shutil.move(tmp_path / "here", tmp_path / "moved")  # the same content in another folder
    assert "resuming after meta-step 2" in metarun(*train, "data.root=moved").stderr
    assert figures(tmp_path, "run") == before
    shutil.copytree(tmp_path / "moved", tmp_path / "again")
    assert "nothing to do" in metarun(*train, "data.root=again").stderr
    for file in (tmp_path / "there").iterdir():  # other content in the same folder
        shutil.copy(file, tmp_path / "moved")
    unfinish(tmp_path / "run")
    assert "other data" in metarun(*train, "data.root=moved", code=2).stderr


def test_an_evaluation_says_that_its_data_are_others(
    metarun: Metarun, tmp_path: Path, data: str
) -> None:
    metarun(*TINY, f"data={data}", *WAY[data])
    own = figures(tmp_path, "run")
    # The environment is for data sets of ours, not for a setting of a plugin's.
    metarun(*EVAL, "hydra.run.dir=a", METARUN_DATA=str(tmp_path / "there"))
    assert figures(tmp_path, "a") == own
    done = metarun(*EVAL, "data.root=there", "hydra.run.dir=b")
    assert "these are other data than in training" in done.stderr
    assert "other data than in training)" in done.stdout
    other = figures(tmp_path, "b")
    assert other["other_data"] is True and other["training_data_identity"] == own["data_identity"]
    assert other["data_identity"] != own["data_identity"]
    done = metarun(*EVAL, "data.root=here", "seed=5", "task.shot=3", "hydra.run.dir=c")
    assert "other data" not in done.stdout + done.stderr
    for file in (tmp_path / "there").iterdir():
        shutil.copy(file, tmp_path / "here")
    done = metarun(*EVAL, code=2)
    assert "the checkpoint was trained on other data" in done.stderr
    assert "data.root=here, they are evaluated on all the same" in done.stderr


def test_a_checkpoint_of_before_goes_on_with_a_word(
    metarun: Metarun, tmp_path: Path, data: str
) -> None:
    metarun(*TINY, f"data={data}", *WAY[data])
    unfinish(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    content = checkpoint.load(last)
    del content["data_identity"]
    last.write_bytes(checkpoint.to_bytes(content))
    word = "does not say which data it has seen: they are not compared"
    assert word in metarun(*TINY, f"data={data}", *WAY[data]).stderr
    assert word not in metarun(*EVAL).stderr, "it says so again"


def stores() -> tuple[ClassStore, ClassStore]:
    images = torch.randint(256, (4, 3, 1, 2, 2), dtype=torch.uint8)
    names = [f"c{i}" for i in range(4)]
    changed = images.clone()
    changed[3, 2, 0, 1, 1] ^= 1
    return from_equal_classes(images, names), from_equal_classes(changed, names)


def test_the_identity_of_a_store_is_that_of_all_its_content(tmp_path: Path) -> None:
    one, other = stores()
    renamed = from_sizes(one.images, one.sizes, ("a", "b", "c", "d"))
    identities = {one.identity, other.identity, renamed.identity}
    identities |= {select_classes(one, [0, 1]).identity, select_classes(one, [1, 0]).identity}
    identities |= {rotated(one).identity, select_classes(other, [0, 1]).identity}
    assert len(identities) == 7
    assert from_sizes(one.images.clone(), one.sizes, one.class_names).identity == one.identity
    for _ in range(2):  # made, then read
        kept = cached(tmp_path / "store.safetensors", lambda: one)
        assert kept.identity == one.identity
    assert kept.known == one.identity, "it is not computed again"
    assert rotated(kept).identity == rotated(one).identity


def test_a_sampled_identity_forgives_rounding_and_nothing_else() -> None:
    class Scaled(Sinusoids):
        scale = 1.0

        def sample(self, split: str, start: int, count: int):  # type: ignore[no-untyped-def]
            drawn = super().sample(split, start, count)
            return drawn._replace(query_y=drawn.query_y * self.scale)

    def identity(scale: float, dtype: torch.dtype = torch.float32) -> str:
        made = Scaled(shot=5, query=5, seed=0, device=torch.device("cpu"), dtype=dtype)
        made.scale = scale
        return identity_of(made)

    assert same_data(identity(1.0), identity(1.0, torch.float64))
    assert not same_data(identity(1.0), identity(1.001))
    assert not same_data(identity(1.0), "episodes:nonsense")
    assert not same_data(identity(1.0), "sinusoid-v1")


def test_a_message_tells_identities_apart_that_begin_alike() -> None:
    begin = "episodes:10/3.13688299,"
    short = [brief_identity(begin + end) for end in ("1/2", "1/3")]
    assert short[0] != short[1] and all(len(text) <= 24 for text in short)
    assert brief_identity("lines-v1-2.0") == "lines-v1-2.0"


def test_a_task_set_has_the_name_of_what_its_tasks_depend_on() -> None:
    shape = {"way": 5, "shot": 1, "query": 15, "within": "all"}
    own = task_set("sha256:ab", "test", 0, shape)
    # Published: another name for the same tasks has to be another number in `DRAWN_BY`.
    assert own == "tasks:ead68b56b7c43b91"
    others = [
        task_set("sha256:ac", "test", 0, shape),
        task_set("sha256:ab", "val", 0, shape),
        task_set("sha256:ab", "test", 1, shape),
        *(task_set("sha256:ab", "test", 0, shape | {key: 2}) for key in shape),
    ]
    assert len({own, *others}) == 8
    assert own == task_set("sha256:ab", "test", 0, dict(reversed(shape.items())))
    assert task_set("episodes:1/2/3", "test", 0, shape) is None


def test_results_name_their_tasks(metarun: Metarun, tmp_path: Path) -> None:
    def named(folder: str, *settings: str) -> str:
        asked = ["episodes=2", *settings, f"hydra.run.dir={folder}"]
        told = metarun("eval", "ckpt=run", *asked).stdout
        found: str = json.loads((tmp_path / folder / "result.json").read_text())["test"]["task_set"]
        assert f"the first 2 of {found}" in told
        return found

    small = ["trainer.steps=1", "trainer.eval_episodes=2", "trainer.test_episodes=2"]
    metarun("train", "backbone.width=2", *small, "hydra.run.dir=run")
    own = json.loads((tmp_path / "run/result.json").read_text())["test"]["task_set"]
    assert own == named("again") == named("steps", "algo.eval_inner_steps=1")
    assert len({own, named("seed", "seed=9"), named("query", "task.query=1")}) == 3
