"""The benchmark: a small run of it, its check of gradients and its arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

BENCH = REPO / "scripts" / "bench"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))


def test_a_quick_run_leaves_records_a_table_and_a_plot(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--threads", "1", "--workloads", "W1",
         "--implementations", "metarun-eager,vmap", "--out", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("gradients agree") == 4
    records = json.loads((tmp_path / "results.json").read_text())
    assert [(r["workload"], r["inner_steps"], r["implementation"]) for r in records] == [
        ("W1", steps, name) for steps in (1, 5) for name in ("metarun-eager", "vmap")
    ]
    for record in records:
        assert (record["order"], record["device"], record["repeats"]) == (2, "cpu", 2)
        assert 0 < record["min_s"] <= record["median_s"] <= record["max_s"]
        assert record["ratio_min"] <= record["ratio"] <= record["ratio_max"]
        assert record["warmup_s"] > 0
        if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            assert record["peak_mib"] >= 0
    assert json.loads((tmp_path / "left_out.json").read_text()) == []
    rows = [row for row in done.stdout.splitlines() if row.startswith("| W1 |")]
    assert [row.split(" | ")[2] for row in rows] == ["metarun-eager", "vmap"] * 2
    assert (tmp_path / "ratios-cpu.png").read_bytes().startswith(b"\x89PNG")


def quick_w1(**other: object) -> object:
    from dataclasses import replace

    from bench.workloads import all_cases

    case = next(case for case in all_cases(quick=True) if case.workload == "W1")
    return replace(case, **other)
