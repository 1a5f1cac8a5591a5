"""The components of docs/components.md, each added by its one file, and as a plugin."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPO

PAGE = (REPO / "docs" / "components.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"`metarun/(components/\w+/\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
)
SMALL = (
    "trainer.steps=2", "trainer.eval_episodes=3", "trainer.test_episodes=3", "task.query=2",
    "trainer.meta_batch=2", "device=cpu",
)  # fmt: skip
COMPANY = {
    "algo": ("data=glyphs", "backbone=conv4", "backbone.width=4"),
    "backbone": ("data=sinusoid",),
    "data": ("backbone=mlp",),
    "inner_opt": ("data=sinusoid", "backbone=mlp", "inner_opt.learn=[lr]"),
    "outer_opt": ("data=sinusoid", "backbone=mlp"),
}


def parts(path: str) -> tuple[str, str]:
    _, group, file = path.split("/")
    return group, file.removesuffix(".py")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with the files of the page in it."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("metarun", "conf", "scripts"):
        shutil.copytree(REPO / folder, copy / folder, ignore=ignored)
    (copy / "metarun" / "conf").symlink_to(copy / "conf")
    for path, text in FILES.items():
        assert not (copy / "metarun" / path).exists(), "the page adds what is not there"
        (copy / "metarun" / path).write_text(text)
    return copy


def run(checkout: Path, environment: dict[str, str], *command: str) -> str:
    environment = environment | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_one_of_each_group() -> None:
    assert sorted(parts(path)[0] for path in FILES) == sorted(COMPANY)


def test_each_is_added_by_its_file_and_a_generated_yaml(
    checkout: Path, environment: dict[str, str]
) -> None:
    written = run(checkout, environment, "scripts/write_conf.py").splitlines()
    assert sorted(written) == sorted(f"conf/{g}/{n}.yaml" for g, n in map(parts, FILES))
    listed = run(checkout, environment, "-m", "metarun", "train", "--help")
    chosen = {group: f"{group}={name}" for group, name in map(parts, FILES)}
    assert all(choice in listed for choice in chosen.values())
    of_images = (*COMPANY["algo"], chosen.pop("algo"))
    for number, together in enumerate((of_images, (*chosen.values(), "inner_opt.learn=[lr]"))):
        arguments = (*together, *SMALL, f"hydra.run.dir=runs/{number}")
        said = run(checkout, environment, "-m", "metarun", "train", *arguments)
        assert f"next: metarun eval ckpt=runs/{number}" in said


@pytest.mark.parametrize("path", FILES)
def test_each_is_a_plugin_with_one_line_more(path: str, metarun: Any, tmp_path: Path) -> None:
    group, name = parts(path)
    schema = re.search(r"@builds\((\w+)\)", FILES[path])
    assert schema is not None
    more = f'register("{group}", "{name}", {schema[1]}, {name})\n'
    text = f"{FILES[path]}\nfrom metarun.components import register\n{more}"
    (tmp_path / f"{name}_plugin.py").write_text(text)
    chosen = (f"+plugins=[{name}_plugin]", *COMPANY[group], f"{group}={name}", *SMALL)
    done = metarun("train", *chosen, "hydra.run.dir=run")
    if group == "data":
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"]["way"] == 1
    assert f"metarun eval '+plugins=[{name}_plugin]' ckpt=run" in done.stdout
    metarun("eval", f"+plugins=[{name}_plugin]", "ckpt=run", "episodes=2", "hydra.run.dir=eval")
