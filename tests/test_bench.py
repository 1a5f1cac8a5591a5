"""The benchmark: a small run of it, its check of gradients and its arithmetic."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun.config import compose
from tests.conftest import REPO

BENCH = REPO / "scripts" / "bench"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))


def test_a_quick_run_leaves_records_a_table_and_a_plot(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bench import cli

    monkeypatch.setenv("METARUN_CACHE", environment["METARUN_CACHE"])
    code = cli.main([
        "--quick", "--threads", "1", "--workloads", "W1", "--implementations",
        "metarun-eager,vmap", "--out", str(tmp_path),
    ])  # fmt: skip
    told = capsys.readouterr()
    assert code == 0, told.err
    assert told.err.count("gradients agree") == 2
    records = json.loads((tmp_path / "results.json").read_text())
    assert [(r["workload"], r["inner_steps"], r["implementation"]) for r in records] == [
        ("W1", 1, "metarun-eager"),
        ("W1", 1, "vmap"),
    ]
    for record in records:
        assert (record["order"], record["device"], record["repeats"]) == (2, "cpu", 2)
        assert 0 < record["min_s"] <= record["median_s"] <= record["max_s"]
        assert record["ratio_min"] <= record["ratio"] <= record["ratio_max"]
        assert record["warmup_s"] > 0
        if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            assert record["peak_mib"] >= 0
    assert json.loads((tmp_path / "left_out.json").read_text()) == []
    rows = [row for row in told.out.splitlines() if row.startswith("| W1 |")]
    assert [row.split(" | ")[2] for row in rows] == ["metarun-eager", "vmap"]
    assert (tmp_path / "ratios-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_another_gradient_ends_the_benchmark_and_a_failure_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import cli, workloads

    names = ("metarun-eager", "metarun-mistyped", "metarun-changed")
    change = "outer_opt.lr=0.0010001"  # seen from the second meta-step on only
    monkeypatch.setitem(workloads.METARUN, names[1], ("inner_opt.momentum=no",))
    monkeypatch.setitem(workloads.METARUN, names[2], ("engine.compile=none", change))
    (case, *_) = workloads.all_cases(quick=True)
    monkeypatch.setattr(cli, "all_cases", lambda quick: [replace(case, implementations=names)])
    assert cli.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "metarun-mistyped: left out: ConfigCompositionException" in told
    assert "the meta-gradient of metarun-changed at meta-step 2 is" in told
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("workload", ["W9-28", "W10-28", "W11-28", "W12", "W13"])
def test_the_peers_of_a_workload_compute_its_meta_gradient(
    workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of a real run, of two meta-steps of a tiny network, all in this process."""
    from bench import measure, pixels, programs, workloads

    monkeypatch.setattr(pixels, "register", compose.register_schemas)  # no option for other tests
    (case,) = (case for case in workloads.all_cases(quick=True) if case.workload == workload)
    small = [
        *(o for o in case.overrides if not o.startswith("data")),
        "data=glyphs", "backbone.width=3", "task.way=3", "task.query=2", "engine.precision=float64",
        "engine.compile=none",
    ]  # fmt: skip

    def gradients(name: str) -> list[dict[str, np.ndarray]]:
        program, found = programs.program(name, case.kind, small, "cpu"), []
        for _ in range(2):
            program.step()
            found.append({key: grad.numpy() for key, grad in program.gradient().items()})
        return found

    wanted, compared = gradients("metarun-eager"), []
    for name in case.implementations:
        if name.startswith("metarun"):
            continue
        try:
            found = gradients(name)
        except RuntimeError as error:
            assert "cannot be imported" in str(error)
            continue
        compare = found[:1] if name in case.rough else found
        for ours, theirs in zip(wanted, compare, strict=False):
            assert measure.difference(ours, theirs) <= case.tolerance(name), name
        compared.append(name)
    assert len(compared) > 1


def test_the_difference_of_gradients_is_relative_to_the_largest_element() -> None:
    from bench.measure import difference
    from bench.workloads import TOLERANCE

    wanted = {"w": np.array([[1.0, -40.0]]), "b": np.array([0.5])}
    assert difference(wanted, wanted) == 0.0
    off = {"w": wanted["w"], "b": wanted["b"] + 40.0 * 2 * TOLERANCE}
    assert difference(wanted, off) == pytest.approx(2 * TOLERANCE)
    assert math.isinf(difference(wanted, {"w": wanted["w"]}))
    assert math.isinf(difference(wanted, wanted | {"b": np.array([0.5, 0.5])}))
    assert math.isnan(difference(wanted, wanted | {"b": np.array([np.nan])}))
    assert math.isnan(difference({"w": np.zeros(2)}, {"w": np.zeros(2)}))


def test_ratios_are_taken_in_each_round() -> None:
    from bench.measure import ratios

    assert ratios([6.0, 30.0, 2.0], [2.0, 5.0, 4.0]) == (3.0, 0.5, 6.0)  # of the medians: 1.5


def test_everybody_is_first_and_last_equally_often() -> None:
    from bench.measure import in_turn

    names = ["a", "b", "c"]
    rounds = [in_turn(names, turn) for turn in range(6)]
    assert all(sorted(order) == names for order in rounds)
    assert sorted(order[0] for order in rounds) == sorted(names * 2)
    assert sorted(order[-1] for order in rounds) == sorted(names * 2)
    pairs = {(order.index("a") < order.index("b")) for order in rounds}
    assert pairs == {True, False}


def test_the_table_shows_medians_spread_and_memory() -> None:
    from bench.tables import markdown

    record = {
        "workload": "W2", "inner_steps": 5, "order": 2, "device": "cpu", "implementation": "vmap",
        "median_s": 0.01234, "min_s": 0.0009, "max_s": 1.5, "peak_mib": 87.25, "repeats": 7,
        "ratio": 2.0, "ratio_min": 1.5, "ratio_max": 2.25, "warmup_s": 3.21, "what": "digits",
        "machine": "a CPU",
    }  # fmt: skip
    absent = record | {"implementation": "higher", "why": "cannot be imported"}
    text = markdown([record, record | {"peak_mib": None, "warmup_s": None}], [absent])
    assert text.startswith("### a CPU\n")
    row = "| W2 | 5 | vmap | 12.3 ms | 900 µs – 1.50 s | 2.00 (1.50–2.25) | 87.2 | 3.2 |"
    assert row in text.splitlines()
    assert "| W2 | 5 | vmap | 12.3 ms | 900 µs – 1.50 s | 2.00 (1.50–2.25) |  |  |" in text
    assert "- W2: digits" in text.splitlines()
    assert "- left out of W2: higher (cannot be imported)" in text.splitlines()


def test_measuring_a_case_again_replaces_its_records_only(tmp_path: Path) -> None:
    from bench import results
    from bench.workloads import Case

    def measured(case: Case, value: float) -> list[dict[str, object]]:
        same = {"workload": case.workload, "inner_steps": case.inner_steps, "device": "cpu"}
        return [same | {"median_s": value}]

    one, five = (Case("W1", "meta-step", "", inner_steps=steps) for steps in (1, 5))
    results.add(tmp_path, one, "cpu", measured(one, 1.0), [])
    results.add(tmp_path, five, "cpu", measured(five, 2.0), [])
    results.add(tmp_path, one, "cpu", measured(one, 3.0), [])
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["median_s"] for record in records] == [3.0, 2.0]
    assert json.loads((tmp_path / "left_out.json").read_text()) == []


def test_the_script_finds_its_package_and_every_case_composes() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['bench', '--workloads', 'W99']\n"
        "try:\n"
        f"    runpy.run_path({str(BENCH)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 2\n"
        "from bench import problem, workloads\n"
        "cases = workloads.all_cases(quick=False)\n"
        "for case in cases + workloads.all_cases(quick=True):\n"
        "    config = problem.config_of(case.overrides)\n"
        "    if case.inner_steps is not None:\n"
        "        assert case.inner_steps == config.algo.inner_steps, case\n"
        "        assert case.order == config.algo.order, case\n"
        "for settings in workloads.METARUN.values():\n"
        "    problem.config_of([*cases[0].overrides, *settings])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_workload_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import cli

    with pytest.raises(SystemExit) as end:
        cli.main(["--workloads", "W1,W99"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert "W99: choose from W1, W2, W3, W4" in told
    assert "W14, W3-5w1s, W3-5w5s, W9-28, W9-84" in told


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("W9-84,W13", ["W9-84", "W13"]), ("W9", ["W9-28", "W9-84"]), ("W1", ["W1", "W1"])],
)
def test_workloads_are_chosen_with_all_variants_or_one(
    text: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And stand in the table by their numbers, whichever was measured first."""
    from bench import cli, measure, results

    taken: list[str] = []

    def run(case: Any, how: Any) -> tuple[list[Any], list[Any]]:
        taken.append(case.workload)
        same = {"workload": case.workload, "inner_steps": case.inner_steps, "device": "cpu"}
        return [], [same | {"implementation": "nobody", "why": "of a test"}]

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(results, "present", lambda folder: (folder / "table.md").write_text(""))
    for chosen in (text, "W12"):
        assert cli.main(["--workloads", chosen, "--out", str(tmp_path)]) == 0
    assert taken == [*wanted, "W12"]
    order = [r["workload"] for r in json.loads((tmp_path / "left_out.json").read_text())]
    assert order == sorted(taken, key=lambda name: int(name[1:].partition("-")[0]))


def test_operations_and_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bench import limits, pixels, workloads

    monkeypatch.setattr(pixels, "register", compose.register_schemas)  # no option for other tests
    (case, *_) = workloads.all_cases(quick=True)
    small = ("backbone.hidden=[7]", "algo.order=1", "task.shot=10", "task.query=10")
    case = replace(case, overrides=(*case.overrides, *small))
    # A layer's product, its gradient for the weights, and for its input but in the first layer.
    support = query = 2 * 10 * (3 * 7 + 2 * 7)
    operations, traffic = limits.counted(case, torch.device("cpu"))
    assert operations == 2 * (support + query), "for two tasks"
    assert traffic > operations, "a product of such matrices is no work for a processor"
    a = torch.ones(3, 5)
    with limits._Bytes() as counted:
        (a + a.t().reshape(3, 5)).view(15)
    assert counted.total == 4 * 15 * (3 + 2), "a sum, and the copy that reshape makes"


def test_limits_are_the_peaks_times_what_was_counted(tmp_path: Path) -> None:
    from bench import limits

    peaks = limits.Peaks(product=2e9, convolution=4e9, copy=1e9)
    record = {"workload": "W2", "inner_steps": 1, "flop": 4e9, "bytes": 5e8,
              "arithmetic_s": 1.0, "bytes_s": 0.5, "measured_s": 3.0}  # fmt: skip
    text = limits.markdown(peaks, [record, record | {"measured_s": None}])
    assert "product 2 GFLOP/s, convolution 4 GFLOP/s, copy 1 GB/s" in text
    assert "| W2 | 1 | 4 | 0.5 | 1.00 s | 500 ms | 3.00 s | 3.0 |\n" in text
    assert "| W2 | 1 | 4 | 0.5 | 1.00 s | 500 ms |  |  |\n" in text
