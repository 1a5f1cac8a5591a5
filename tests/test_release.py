"""What is released: a source distribution, and the wheel that is built from it."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from metarun import __version__
from tests.conftest import REPO


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both files, built without a network; the wheel from the other one."""
    folder = tmp_path_factory.mktemp("release")
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in tracked:  # a copy, so that the build leaves nothing in the repository
        if (REPO / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((REPO / name).read_bytes())
    done = subprocess.run(
        [
            sys.executable, "-m", "build", "--no-isolation",
            "--outdir", str(folder / "dist"), str(folder / "source"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (built,) = dist.glob("*.whl")
    return built


def test_an_index_would_take_both_files(dist: Path) -> None:
    built = sorted(path.name for path in dist.iterdir())
    assert built == [f"metarun-{__version__}-py3-none-any.whl", f"metarun-{__version__}.tar.gz"]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_changelog_begins_with_this_version() -> None:
    text = (REPO / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions[0] == __version__
    assert versions == sorted(set(versions), key=lambda v: [*map(int, v.split("."))], reverse=True)


def test_the_source_distribution_holds_the_whole_project(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    of_the_repository_only = {".gitignore", ".ci/run"}
    source = dist.parent / "source"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    built_in_place = {name for name in files if name.startswith("metarun.egg-info/")}
    missing = files - of_the_repository_only - built_in_place - names
    assert missing == set(), "MANIFEST.in, or for conf/ the packages in pyproject.toml"


def test_the_wheel_carries_exactly_the_configs_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        inside = {
            name.removeprefix("metarun/conf/"): archive.read(name).decode()
            for name in names
            if name.startswith("metarun/conf/") and name.endswith(".yaml")
        }
    tree = {
        str(p.relative_to(REPO / "conf")): p.read_text() for p in (REPO / "conf").rglob("*.yaml")
    }
    assert inside == tree and len(tree) > 10
    assert "metarun/py.typed" in names
    assert not any(name.startswith(("tests/", "scripts/", "conf/")) for name in names)
    for path in [*(REPO / "metarun").rglob("*.py"), *(REPO / "metarun").rglob("*.toml")]:
        assert str(path.relative_to(REPO)) in names


def test_the_wheel_trains_in_an_environment_of_its_own(
    wheel: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A new virtual environment that shares torch and the like, but not this checkout."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    shared = next(p for p in sys.path if p.endswith("site-packages"))
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "shared.pth").write_text(shared + "\n")  # its packages, but not its .pth files
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment.pop("PYTHONPATH", None)
    where = subprocess.run(
        [
            python,
            "-c",
            "import metarun, metarun.conf; print(metarun.__file__, metarun.conf.__file__)",
        ],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.count(str(site)) == 2
    done = subprocess.run(
        [
            tmp_path / "venv" / "bin" / "metarun",
            "train",
            "data=sinusoid",
            "backbone=mlp",
            "trainer.steps=3",
            "trainer.eval_episodes=4",
            "trainer.test_episodes=4",
        ],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "test mse" in done.stdout
    assert list(elsewhere.glob("outputs/train/*/result.json"))
