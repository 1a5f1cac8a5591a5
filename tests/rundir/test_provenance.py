"""What provenance.json says of the code of a run, and what is read from it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from metarun.rundir.provenance import codes_of, git_state, write_provenance
from metarun.sweeps.job import code_state
from tests.conftest import IN_CHECKOUT, REPO


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPO), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not IN_CHECKOUT, reason="not a checkout of which git tells the revision")
def test_a_run_and_a_sweep_from_a_checkout_record_its_revision(tmp_path: Path) -> None:
    path = tmp_path / "provenance.json"
    write_provenance(path, {}, "CPU", 1)
    expected = {
        "revision": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "metarun")),
    }
    assert json.loads(path.read_text())["git"] == git_state() == code_state()["git"] == expected
    [code] = codes_of(json.loads(path.read_text()))
    assert code == f"revision {expected['revision'][:12]}" + " with changes" * expected["dirty"]


def attempt(revision: str | None, dirty: bool = False) -> dict[str, Any]:
    state = None if revision is None else {"revision": revision, "dirty": dirty}
    return {"git": state, "versions": {"metarun": "0.2.0"}}


def test_each_attempt_keeps_its_code(tmp_path: Path) -> None:
    path = tmp_path / "provenance.json"
    first = attempt("a" * 40)
    write_provenance(path, first, "CPU", 1)
    second = json.loads(path.read_text())
    write_provenance(path, dict(second), "CPU", 2)
    third = json.loads(path.read_text())
    assert third["earlier_attempts"] == [first, {k: second[k] for k in second if k in third and
                                                 k != "earlier_attempts"}]  # fmt: skip
    assert codes_of(third) == (f"revision {'a' * 12}", *codes_of({"git": third["git"],
                               "versions": third["versions"]}))  # fmt: skip


@pytest.mark.parametrize(
    ("provenance", "codes"),
    [
        ({}, ("an unknown version",)),
        (attempt(None), ("version 0.2.0",)),
        (attempt("b" * 40, dirty=True), (f"revision {'b' * 12} with changes",)),
        (
            attempt(None) | {"earlier_attempts": [attempt("b" * 40), attempt(None), 3]},
            (f"revision {'b' * 12}", "version 0.2.0"),
        ),
        (attempt(None) | {"earlier_attempts": "none"}, ("version 0.2.0",)),
    ],
)
def test_codes_are_named_once_in_order(provenance: dict[str, Any], codes: tuple[str, ...]) -> None:
    assert codes_of(provenance) == codes
