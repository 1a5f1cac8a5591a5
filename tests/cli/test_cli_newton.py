"""`inner_opt=newton` and `inner_opt=partition`, through real processes."""

import json
from pathlib import Path

import pytest

from metarun.components.inner_opt.partition import PartitionConfig
from metarun.errors import ConfigError
from metarun.rundir import checkpoint
from tests.conftest import Metarun

SHORT = (
    "data=sinusoid",
    "backbone=mlp",
    "trainer.steps=40",
    "trainer.eval_every=40",
    "trainer.eval_episodes=20",
    "trainer.test_episodes=50",
    "hydra.run.dir=run",
)
GLYPHS = (
    "data=glyphs",
    "backbone.width=16",
    "task={way:3,shot:1,query:3}",
    "trainer={steps:25,meta_batch:8,eval_every:25,eval_episodes:10,test_episodes:60}",
    "hydra.run.dir=run",
)
NEWTON = ("algo=anil", "inner_opt=newton")
PARTS = "[{params:body.*,name:sgd,lr:0.01},{params:head.*,name:newton,trust_radius:3}]"


def scores(folder: Path, name: str) -> list[float]:
    result = json.loads((folder / "run" / "result.json").read_text())
    return result["test"][f"{name}_per_inner_step"]


@pytest.mark.parametrize(
    "choice",
    [
        (*NEWTON, "inner_opt.trust_radius=3"),
        (*NEWTON, "inner_opt.trust_radius=null", "inner_opt.damping=0.1"),
        ("inner_opt=partition", f"inner_opt.parts={PARTS}", "algo.order=1", "trainer.steps=80"),
    ],
    ids=["trust region", "damping", "mixed, first order"],
)
def test_regression_is_adapted_by_newton_steps(
    metarun: Metarun, tmp_path: Path, choice: tuple[str, ...]
) -> None:
    metarun("train", *SHORT, *choice)
    mse = scores(tmp_path, "mse")
    assert mse[1] < mse[0] and min(mse) < 0.75 * mse[0]


def test_classification_is_learned(metarun: Metarun, tmp_path: Path) -> None:
    metarun("train", *GLYPHS, *NEWTON)
    accuracy = scores(tmp_path, "accuracy")
    assert accuracy[0] < 0.45 and accuracy[1] > 0.6, "chance is a third"


def test_settings_of_parts_are_learned_and_kept_in_the_checkpoint(
    metarun: Metarun, tmp_path: Path
) -> None:
    parts = "[{params:body.*,name:adam,lr:0.02},{params:[head.weight,head.bias],name:newton}]"
    metarun(
        "train", *SHORT, "inner_opt=partition", f"inner_opt.parts={parts}",
        "inner_opt.learn=[0.lr,1.trust_radius]", "inner_opt.granularity=step",
    )  # fmt: skip
    content = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.safetensors")
    for name, start in (("0.lr", 0.02), ("1.trust_radius", 1.0)):
        learned = content["meta"][f"inner_opt.{name}"]
        assert learned.shape == (1,) and learned.item() != pytest.approx(start)
    metarun("eval", "ckpt=run", "hydra.run.dir=eval")
    again = json.loads((tmp_path / "eval" / "result.json").read_text())["test"]
    assert again["mse_per_inner_step"] == scores(tmp_path, "mse")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("inner_opt=newton", ["Hessian of", "algo=anil", "inner_opt=partition"]),
        ("inner_opt=partition inner_opt.parts=[{params:body.*,name:sgd,speed:1}]",
         ["sgd has no setting 'speed'; it has lr"]),
        ("inner_opt=partition inner_opt.learn=[0.speed]", ["cannot learn '0.speed'", "0.lr"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_run_begins(
    metarun: Metarun, tmp_path: Path, arguments: str, messages: list[str]
) -> None:
    done = metarun("train", *arguments.split(), code=2)
    assert len(done.stderr.splitlines()) == 1
    assert all(message in done.stderr for message in messages)
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts is empty; expected e.g."),
        ([{"name": "sgd"}], "names no parameters; expected e.g."),
        ([{"params": [], "name": "sgd"}], "names no parameters; expected e.g."),
        ([{"params": "body.*"}], "needs the name of an optimizer: one of ada"),
        ([{"params": "*", "name": "mixed"}], "needs the name of an optimizer: one of ada"),
        ([{"params": "*", "name": "sgd", "learn": ["lr"]}], "sgd has no setting 'learn'"),
        ([{"params": "*", "name": "sgd", "lr": "fast"}], "lr=fast of sgd: must be float"),
        ([{"params": "*", "name": "sgd", "lr": True}], "lr=True of sgd: must be float"),
        ([{"params": "*", "name": "sgd", "lr": None}], "lr=None of sgd: must be float"),
        ([{"params": "*", "name": "newton", "joint": 1}], "joint=1 of newton: must be bool"),
        ([{"params": "*", "name": "sgd", "lr": -1}], "parts, sgd: lr=-1: must be 0 or more"),
    ],
)
def test_the_parts_are_checked_by_the_schema_of_their_own_optimizer(parts, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PartitionConfig(parts=parts)
    assert message in str(error.value)


def test_a_part_may_have_any_setting_of_its_optimizer() -> None:
    PartitionConfig(parts=[{"params": ["a", "b.*"], "name": "sgd", "lr": 1, "nesterov": True}])
    PartitionConfig(parts=[{"params": "*", "name": "newton", "trust_radius": None}])
