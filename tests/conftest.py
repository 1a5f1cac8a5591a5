"""Fixtures shared by all tests."""

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metarun.components.backbone import conv4
from metarun.config.catalogue import components
from tests.forking import Forks

REPO = Path(__file__).parent.parent


def _in_checkout() -> bool:
    """Whether git tells this folder's revision; it refuses to where another user owns it."""
    try:
        command = ["git", "-C", str(REPO), "rev-parse", "HEAD"]
        told = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False
    return told and (REPO / ".git").exists()


IN_CHECKOUT = _in_checkout()

gc.disable()  # until all tests are collected: imports make a million objects, next to no garbage


def pytest_collection_finish() -> None:
    """Collect garbage from here on, more seldom, and never what was imported."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ask for the real data; skip those marked `gpu` without a CUDA device."""
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real_data")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this test session, for all its workers; not the user's."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real Omniglot files; the test is skipped where there is none."""
    root = Path(os.environ.get("METARUN_DATA") or REPO.parent / "shared" / "data")
    if not (root / "omniglot-py").is_dir():
        pytest.skip(f"no Omniglot in {root}: set METARUN_DATA")
    return root


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    """An environment for metarun's processes that owes nothing to the user's."""
    ours = ("METARUN_", "HYDRA_", "TORCHINDUCTOR_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return kept | {"METARUN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two_blocks() -> Iterator[None]:
    """Half of conv4, in half the time: what is asked of one block is asked of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv4, "BLOCKS", 2)
        yield


def swap_builder(
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    name: str,
    build: Callable[..., Any],
    is_plugin: bool = False,
) -> None:
    """Build a component of ours in another way during a test."""
    known = components(group)
    changed = known[name]._replace(build=build, is_plugin=is_plugin)
    monkeypatch.setitem(known, name, changed)


Metarun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """What starts commands of metarun in processes forked from one that has imported torch."""
    started = Forks(tmp_path_factory.mktemp("streams"))
    yield started
    started.end()


@pytest.fixture
def metarun(tmp_path: Path, environment: dict[str, str], forks: Forks) -> Metarun:
    """Run the real command line in a temporary folder: `metarun("train", "seed=1", code=0)`."""

    def run(*arguments: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        command = forks.start(arguments, tmp_path, environment | env)
        out, err = command.communicate()
        done = subprocess.CompletedProcess(["metarun", *arguments], command.wait(0), out, err)
        assert done.returncode == code, f"exit {done.returncode}\n{out}\n{err}"
        if code:
            assert "Traceback" not in err
        return done

    return run


@pytest.fixture(autouse=True)
def no_global_settings_leak() -> Iterator[None]:
    """No test may leave another default dtype, thread count or determinism setting behind."""
    before = (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    yield
    assert before == (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
