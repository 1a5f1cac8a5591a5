"""The page of `make gpu-check`: from what its stages leave, whatever is missing."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from metarun.config.compose import register_schemas
from scripts.gpu_check.page import bench_rows, page
from scripts.gpu_check.profile import busy, measure
from tests.conftest import REPO


@pytest.mark.parametrize(
    ("intervals", "part"),
    [
        ([], 0.0),
        ([(3.0, 3.0)], 0.0),
        ([(0.0, 1.0), (3.0, 4.0)], 0.5),
        ([(2.0, 4.0), (0.0, 3.0), (1.0, 2.0)], 1.0),
        ([(0.0, 10.0), (1.0, 2.0), (15.0, 20.0)], 0.75),
    ],
)
def test_busy_is_the_union_of_the_kernels(
    intervals: list[tuple[float, float]], part: float
) -> None:
    assert busy(intervals) == pytest.approx(part)


def record(workload: str, name: str, ratio: float, order: int = 2) -> dict[str, object]:
    return {
        "workload": workload, "inner_steps": 5, "order": order, "implementation": name,
        "median_s": 0.01, "ratio": ratio, "ratio_min": ratio, "ratio_max": ratio, "peak_mib": 7.0,
        "machine": "some GPU", "device": "cuda",
    }  # fmt: skip


def test_a_page_says_what_was_reached_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "stages.tsv").write_text("tests\t1\t9\nbench\t124\t240\nprofile\t0\t20\n")
    (tmp_path / "bench").mkdir()
    records = [
        record("W1", "metarun", 1.0), record("W1", "higher", 31.0), record("W2", "vmap", 2.0),
        record("W3-5w1s", "higher", 5.5), record("W8", "higher", 2.0, order=1),
    ]  # fmt: skip
    (tmp_path / "bench" / "results.json").write_text(json.dumps(records))
    profile = {"busy": 0.8, "kernels_per_step": 12.0, "ms_per_step": 1.5, "waits_per_step": 0.0}
    (tmp_path / "profile.json").write_text(json.dumps({"ProtoNet": profile}))
    result = {"test": {"accuracy": 0.98, "ci95": 0.01}, "steps": 9, "train_seconds": 7.0}
    (tmp_path / "train" / "bf16").mkdir(parents=True)
    (tmp_path / "train" / "bf16" / "result.json").write_text(json.dumps(result))
    text, plain = page(tmp_path)
    assert "| tests | 1 (failed) | 9 |" in text
    assert "| bench | 124 (too long) | 240 |" in text
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| W")]
    verdicts = {f"{row[0][2:]} {row[2]}": row[-1] for row in rows}
    assert "reached (30 wanted)" in verdicts["W1 higher"]
    assert "missed (3 wanted)" in verdicts["W2 vmap"]
    assert "reached (5 wanted)" in verdicts["W3-5w1s higher"]
    assert "wanted" not in verdicts["W8 higher"] + verdicts["W1 metarun"]
    assert "wanted" not in bench_rows([records[1] | {"device": "cpu"}])[0], "a rehearsal"
    assert "80 %, missed (90 wanted)" in text
    assert "| bf16 | 98.00 ± 1.00 % | 9 | 7 |" in text
    assert plain["stages"][0] == {"name": "tests", "code": 1, "seconds": 9}


def test_a_page_comes_of_nothing_as_well(tmp_path: Path) -> None:
    (tmp_path / "stages.tsv").write_text("tests\t1\t9\n")
    text, _ = page(tmp_path)
    assert "Benchmark" not in text


def test_a_profile_has_figures_of_a_cpu_too() -> None:
    register_schemas()
    settings = ("data=sinusoid", "backbone=mlp", "trainer.meta_batch=2", "engine.compile=replay")
    found = measure(settings, torch.device("cpu"))
    assert 0 < found["busy"] <= 1
    assert found["ms_per_step"] > 0


def test_the_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", str(REPO / "scripts" / "gpu_check.sh")], check=True)
