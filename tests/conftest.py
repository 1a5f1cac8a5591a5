"""Fixtures shared by all tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ask for the real data; skip those marked `gpu` without a CUDA device."""
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real_data")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the data sets of this test session; not the user's."""
    return tmp_path_factory.mktemp("cache")


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
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("METARUN_", "HYDRA_"))}
    return kept | {"METARUN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


Metarun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def metarun(tmp_path: Path, environment: dict[str, str]) -> Metarun:
    """Run the real command line in a temporary folder: `metarun("train", "seed=1", code=0)`."""

    def run(*arguments: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "metarun", *arguments],
            cwd=tmp_path,
            env=environment | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        if code:
            assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(autouse=True)
def no_global_settings_leak() -> Iterator[None]:
    """No test may leave another default dtype, thread count or determinism setting behind."""
    before = (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    yield
    assert before == (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
