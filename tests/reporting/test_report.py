"""`metarun report`: real runs, made-up runs in every state, and the page in a real browser."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from scipy import stats
from selenium.webdriver.common.by import By

from metarun.cli.report import write_report
from metarun.errors import ConfigError
from metarun.reporting.calibrations import reliability_plot
from metarun.reporting.gather import gather
from metarun.reporting.groups import differing
from metarun.reporting.labels import as_text, short_names
from tests.browser import browser, set_width
from tests.cli.test_cli import SHORT
from tests.conftest import Metarun
from tests.setups import config_of

__all__ = ["browser"]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The resolved config of a training run on glyphs."""
    return asdict(config_of())


@pytest.fixture
def make(tmp_path: Path, config: dict[str, Any]) -> Callable[..., Path]:
    """Write the directory of a run as metarun leaves it: `make("a", seed=1, value=0.9)`."""

    def run(
        name: str,
        *,
        value: float = 0.9,
        score: str = "accuracy",
        status: str = "completed",
        error: str | None = None,
        pid: int | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        own = json.loads(json.dumps(config)) | {"seed": seed}
        for key, setting in (settings or {}).items():
            group, _, leaf = key.partition(".")
            own[group][leaf] = setting
        (folder / "config.yaml").write_text(yaml.safe_dump(own))
        host = {"host": socket.gethostname(), "pid": pid or os.getpid()}
        (folder / "provenance.json").write_text(json.dumps(host))
        (folder / "status.json").write_text(json.dumps({"status": status, "error": error}))
        entries = [
            {
                "step": step, f"val/{score}": value * step / 2000, "val/loss": 1 - step / 4000,
                "time/tasks_per_s": 160.0, "time/elapsed_s": step / 10,
            }
            for step in range(200, 2001, 200)
        ]  # fmt: skip
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / "metrics.jsonl").write_text(text)
        if status == "completed":
            per_step = [0.2, value - 0.1, value]
            test = {
                "score": score, score: value, "ci95": 0.01, "episodes": 600,
                f"{score}_per_inner_step": per_step, "loss_per_inner_step": [1.6, 0.5, 0.3],
            }  # fmt: skip
            result = {
                "test": test, "best": {"step": 2000, "score": value - 0.02, "ci95": 0.01},
                "train_seconds": 200.0, "peak_memory_gib": 1.5, "device": "CPU (1 threads)",
            }  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result))
        return folder

    return run


def lines_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_real_runs_are_reported_with_their_own_figures(metarun: Metarun, tmp_path: Path) -> None:
    metarun("train", "-m", *SHORT, "inner_opt.lr=0.01,0.02", "seed=0,1", "hydra.sweep.dir=sweep")
    done = metarun("report", "sweep")
    assert "4 runs: 4 completed" in done.stdout and "sinusoid, 10 shots" in done.stdout
    results: dict[float, list[dict[str, Any]]] = {0.01: [], 0.02: []}
    for path in (tmp_path / "sweep").glob("*/result.json"):
        lr = yaml.safe_load((path.parent / "config.yaml").read_text())["inner_opt"]["lr"]
        results[lr].append(json.loads(path.read_text()))
    lines = lines_of(tmp_path / "sweep" / "report.csv")
    assert sorted(float(line["inner_opt.lr"]) for line in lines) == [0.01, 0.02]
    for line in lines:
        values = [r["test"]["mse"] for r in results[float(line["inner_opt.lr"])]]
        low, high = stats.t.interval(0.95, 1, loc=fmean(values), scale=stats.sem(values))
        assert float(line["value"]) == pytest.approx(fmean(values), rel=1e-12)
        assert float(line["ci95"]) == pytest.approx((high - low) / 2, rel=1e-12)
        assert (line["ci95_over"], line["seeds"], line["score"]) == ("seeds", "0 1", "mse")
        seconds = [r["train_seconds"] for r in results[float(line["inner_opt.lr"])]]
        assert float(line["train_seconds"]) == pytest.approx(fmean(seconds))
        assert float(line["meta_steps_per_s"]) > 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / "sweep" / name).read_text()
        assert "0.01" in text and "2 seeds" in text
    assert len(lines_of(tmp_path / "sweep" / "report_runs.csv")) == 4
    again = metarun("report", "sweep", "sweep/")  # each run once, over its own report
    assert "4 runs: 4 completed" in again.stdout


def test_one_seed_has_the_interval_over_its_tasks_and_says_so(
    make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    make("runs/a0", value=0.90)
    make("runs/a1", value=0.94, seed=1)
    make("runs/b0", value=0.70, settings={"inner_opt.lr": 0.1})
    out = metarun("report", "runs").stdout
    (several,) = [line for line in out.splitlines() if "2 seeds" in line]
    (alone,) = [line for line in out.splitlines() if "600 tasks of 1 seed" in line]
    low, high = stats.t.interval(0.95, 1, loc=0.92, scale=0.02)
    assert f"92.00 ± {100 * (high - low) / 2:.2f} %" in several
    assert "70.00 ± 1.00 %" in alone
    assert out.index(several) < out.index(alone), "the best validation score comes first"
    by_over = {line["ci95_over"]: line for line in lines_of(tmp_path / "runs" / "report.csv")}
    assert by_over["tasks"]["inner_opt.lr"] == "0.1" and set(by_over) == {"tasks", "seeds"}


def test_where_the_data_lie_and_a_repeated_seed_make_no_group_and_no_seed(
    make: Callable[..., Path], metarun: Metarun
) -> None:
    make("runs/a", value=0.9)
    make("runs/b", value=0.9, settings={"trainer.wandb": "offline"})
    out = metarun("report", "runs").stdout
    assert "600 tasks of 1 seed" in out and "2 seeds" not in out
    assert "runs/b repeats runs/a (same settings, same seed): it is not counted" in out


def test_a_run_from_before_augmentation_is_one_without_it(
    make: Callable[..., Path], metarun: Metarun
) -> None:
    older = make("runs/a", value=0.9) / "config.yaml"
    kept = yaml.safe_load(older.read_text())
    del kept["augment"]
    older.write_text(yaml.safe_dump(kept))
    make("runs/b", value=0.92, seed=1)
    make("runs/c", value=0.8, settings={"augment.crop": 4})
    out = metarun("report", "runs").stdout
    assert "2 seeds" in out and "600 tasks of 1 seed" in out and "augment.crop" in out


def test_what_cannot_be_compared_is_not_put_into_one_table(
    make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    make("runs/five", value=0.9)
    make("runs/twenty", value=0.8, settings={"task.way": 20})
    make("runs/mse", value=0.3, score="mse", settings={"data.name": "sinusoid"})
    make("runs/mse2", value=0.2, score="mse", settings={"data.name": "sinusoid", "algo.order": 1})
    out = metarun("report", "runs").stdout
    for title in ("5-way 1-shot", "20-way 1-shot", "sinusoid, 1 shots"):
        assert title in out
    assert out.index("0.2 ±") < out.index("0.3 ±"), "a lower error is better"
    assert {line["score"] for line in lines_of(tmp_path / "runs" / "report.csv")} == {
        "accuracy", "mse",
    }  # fmt: skip


def test_a_run_is_as_far_as_its_newest_checkpoint(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    """Where it was interrupted, it has saved more than it has logged."""
    folder = make("s/interrupted", status="interrupted", settings={"trainer.steps": 5000})
    (folder / "checkpoints").mkdir()
    for name in ("last", "best-step-00004000", "step-00002173", "step-00002000", "step-x"):
        (folder / "checkpoints" / f"{name}.safetensors").touch()
    (run,) = gather([tmp_path / "s"]).runs
    assert run.progress == "2173/5000"


def test_runs_without_a_result_are_listed_with_the_reason(
    make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    make("s/failed", status="failed", error="RunError: the loss became NaN | at step 3\nmore")
    make("s/interrupted", status="interrupted")
    make("s/running", status="running")
    gone = 2**22 + 1  # more than Linux gives out
    make("s/killed", status="running", pid=gone)
    (make("s/pending", status="running") / "status.json").unlink()
    runs = {"bad": {"status": "failed", "error": "ConfigError: task.shot=0"}, "failed": {}}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"runs": runs}))
    out = metarun("report", "s").stdout
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("s/")}
    names = ("failed", "interrupted", "running", "killed", "pending", "bad")
    assert set(rows) == {f"s/{name}" for name in names}
    assert "the loss became NaN | at step 3 more" in rows["s/failed"]
    assert "2000/2000" in rows["s/interrupted"] and " running " in rows["s/running"]
    assert " killed " in rows["s/killed"] and "never started" in rows["s/pending"]
    assert "task.shot=0" in rows["s/bad"]
    assert "NaN \\| at" in (tmp_path / "s" / "report.md").read_text()
    assert (tmp_path / "s" / "report.html").exists()


def test_runs_below_a_folder_with_records_are_found(make: Callable[..., Path]) -> None:
    run = make("sweep/a")
    make("sweep/a/more/b", seed=1)
    make("sweep/a/checkpoints/c", seed=2)
    sweep = run.parent
    (sweep / "result.json").write_text('{"ckpt": "x", "test": {}}')
    refused = {"bad": {"status": "failed", "error": "ConfigError: task.shot=0"}}
    (sweep / "sweep.json").write_text(json.dumps({"runs": refused}))
    found = gather([sweep])
    assert [run.directory.name for run in found.runs] == ["a", "b"]
    assert [path.name for path, _ in found.refused] == ["bad"]
    assert found.skipped == [(sweep, "an evaluation, not a training run")]


def test_huge_but_finite_figures_are_reported(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        make(f"runs/a{seed}", seed=seed, value=1.1e19, score="mse", settings={"inner_opt.lr": 0.3})
        make(f"runs/b{seed}", seed=seed, value=1.7e308, score="mse")
    make("runs/c0", value=1.7e308, score="mse", settings={"inner_opt.lr": 0.7})
    make("runs/c1", seed=1, value=-1.7e308, score="mse", settings={"inner_opt.lr": 0.7})
    fast = make("runs/d", value=0.5, score="mse", settings={"inner_opt.lr": 0.9})
    runs, log = fast.parent, fast / "metrics.jsonl"
    log.write_text(log.read_text().replace("160.0", "1.7e308").replace("100.0", "1.7e308"))
    write_report([runs], runs)
    assert "7 runs: 7 completed" in capsys.readouterr().out
    lines = lines_of(runs / "report.csv")
    values = {line["inner_opt.lr"]: float(line["value"]) for line in lines}
    assert sorted(values.values()) == pytest.approx([0.0, 0.5, 1.1e19, 1.7e308])


def test_tables_of_others_are_not_overwritten_and_ours_are(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    run = make("run")
    for name in ("report.csv", "report_runs.csv", "report.html", "report.md"):
        own = tmp_path / f"for_{name}"
        own.mkdir()
        (own / name).write_text("a,b\n")
        with pytest.raises(ConfigError, match=f"{name} is no report of metarun"):
            write_report([run], own)
        assert [path.name for path in own.iterdir()] == [name]
        assert (own / name).read_text() == "a,b\n"
    write_report([run], tmp_path / "report")
    write_report([run], tmp_path / "report")


def test_a_table_holds_no_formula(make: Callable[..., Path], tmp_path: Path) -> None:
    for seed, name in enumerate(("=1+1", "@sum", "-x", "+y")):
        make(f"runs/{seed}", seed=seed, settings={"inner_opt.name": name, "inner_opt.lr": -0.5})
    make("runs/bad", status="failed", error="=cmd")
    write_report([tmp_path / "runs"], tmp_path)
    names = {line["inner_opt.name"] for line in lines_of(tmp_path / "report.csv")}
    assert names == {"'=1+1", "'@sum", "'-x", "'+y"}
    lines = lines_of(tmp_path / "report_runs.csv")
    assert {line["inner_opt.lr"] for line in lines} >= {"-0.5"}, "a number stays one"
    assert "'=cmd" in {line["error"] for line in lines}


def test_a_list_is_shown_as_one_types_it() -> None:
    assert as_text(["*"]) == "[*]" and as_text(["head.*", 0.1, True]) == "[head.*, 0.1, true]"


DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "no_result": ("result.json", None, "result.json is missing or damaged"),
    "half_result": ("result.json", b'{"test": {"accu', "result.json is damaged"),
    "zeros": ("result.json", b"\0" * 100, "result.json is damaged"),
    "binary": ("result.json", b"\xff\xfe\x00\x80", "result.json is damaged"),
    "list": ("result.json", b"[1]", "result.json is damaged"),
    "no_test": ("result.json", b'{"best": 1}', "result.json lacks 'test'"),
    "nan": ("result.json", b'{"test": {"score": "accuracy", "accuracy": null, "ci95": null}}',
            "no finite figures"),
    "huge": ("result.json", b'{"test": {"score": "accuracy", "accuracy": 1' + b"0" * 400
             + b', "ci95": null}}', "no finite figures"),
    "strange": ("result.json", b'{"test": 3}', "no finite figures"),
    "deep": ("result.json", b"[" * 100_000, ""),
    "no_config": ("config.yaml", None, "config.yaml is missing"),
    "half_config": ("config.yaml", b"algo: {name: ma", "config.yaml is damaged"),
    "other_config": ("config.yaml", b"server: {port: 80}", "no config of metarun"),
    "bomb": ("config.yaml", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
    "deep_config": ("config.yaml", b"a: " + b"[" * 100_000, "config.yaml is damaged"),
    "long_config": ("config.yaml", b"#" * 2**18, "config.yaml is larger than 128 KiB"),
    "code": ("config.yaml", b"!!python/object/apply:os.system ['touch pwned']", "is damaged"),
    "status": ("status.json", b"{", "status.json is damaged"),
}  # fmt: skip


def calibrated(folder: Path, ece: float, **other: object) -> Path:
    """A directory of an evaluation with two bins, one without predictions."""
    bins = [
        {"low": 0, "high": 0.5, "predictions": 0, "confidence": None, "accuracy": None},
        {"low": 0.5, "high": 1, "predictions": 9, "confidence": 0.75, "accuracy": 0.625},
    ]
    own = {"tasks": 40, "temperature": 1.25, "ece": ece, "ece_before": 0.2, "coverage": 0.9,
           "measured_coverage": 0.875, "labels_in_a_set": 1.5, "reliability": bins,
           "reliability_before": bins} | other  # fmt: skip
    folder.mkdir(parents=True)
    content = {"ckpt": "run/checkpoints/best.safetensors", "test": {"calibration": own}}
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def test_calibrated_evaluations_have_a_table_and_a_diagram(
    make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    make("runs/good")
    calibrated(tmp_path / "runs" / "a_worse", 0.125)
    calibrated(tmp_path / "runs" / "better", 0.0625)
    calibrated(tmp_path / "runs" / "damaged", 0.1, reliability=7)
    calibrated(tmp_path / "runs" / "wild", 0.1, temperature="1")
    found = gather([tmp_path / "runs"]).calibrated
    assert [own.directory.name for own in found] == ["better", "a_worse"]
    done = metarun("report", "runs", "out=report").stdout
    (row,) = [line for line in done.splitlines() if line.startswith("runs/better")]
    assert row.split()[1:] == ["run/checkpoints/best.safetensors", "40", "test", "1.25", "6.2", "%",
                               "20.0", "%", "90.0", "%", "87.5", "%", "1.50"]  # fmt: skip
    for name in ("damaged", "wild"):
        assert f"runs/{name}: result.json holds no figures of a calibration" in done
    page = (tmp_path / "report" / "report.html").read_text()
    assert 'alt="Reliability, calibrated evaluations"' in page
    assert "Calibrated evaluations" in (tmp_path / "report" / "report.md").read_text()
    plot = reliability_plot(found)
    assert plot is not None and "better (error 6.2%)" in plot.svg
    alone = metarun("report", "runs/a_worse", "out=alone").stdout
    assert alone.startswith("0 runs") and "12.5 %" in alone
    assert reliability_plot([]) is None


def confused(folder: Path, **other: object) -> Path:
    """A directory of an evaluation of three classes."""

    def one(queries: int, accuracy: float, *mistake: object) -> dict[str, object]:
        names = ("taken_for", "queries", "of")
        worst = dict(zip(names, mistake, strict=True)) if mistake else None
        return {"queries": queries, "accuracy": accuracy, "mistake": worst}

    classes = {
        "cat": one(40, 0.5, "eel", 10, 25), "dog": one(30, 0.25, "cat", 12, 16), "eel": one(20, 1.0)
    }  # fmt: skip
    folder.mkdir(parents=True)
    own = {"classes": classes, "pairs": []} | other
    content = {"ckpt": "run/checkpoints/best.safetensors", "test": {"confusion": own}}
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def test_confused_classes_have_a_table(metarun: Metarun, tmp_path: Path) -> None:
    confused(tmp_path / "runs" / "one")
    confused(tmp_path / "runs" / "damaged", classes=7)
    confused(tmp_path / "runs" / "empty", classes={"cat": {}})
    done = metarun("report", "runs", "out=report").stdout
    rows = [line.split()[3:] for line in done.splitlines() if line.startswith("runs/one")]
    assert rows == [
        ["dog", "30", "25.0", "%", "cat", "75.0", "%", "of", "16"],
        ["cat", "40", "50.0", "%", "eel", "40.0", "%", "of", "25"],
        ["eel", "20", "100.0", "%", "–", "–"],
    ]
    assert "runs/damaged: result.json holds no counts of confusions" in done
    assert "runs/empty: result.json lacks 'mistake' of its confusions" in done
    for name in ("report.md", "report.html"):
        assert "Classes that are confused" in (tmp_path / "report" / name).read_text()


def test_damaged_directories_are_named_and_skipped(
    make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    make("runs/good")
    for name, (file, content, _) in DAMAGE.items():
        path = make(f"runs/{name}", value=0.5) / file
        path.unlink() if content is None else path.write_bytes(content)
    pipe = make("runs/pipe") / "result.json"
    pipe.unlink()
    os.mkfifo(pipe)
    (tmp_path / "runs" / "eval").mkdir()
    (tmp_path / "runs" / "eval" / "result.json").write_text('{"ckpt": "x", "test": {}}')
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    shutil.copytree(tmp_path / "runs" / "good", tmp_path / "runs" / "good" / "tb" / "nested")
    done = metarun("report", "runs", "out=report")
    assert "1 run: 1 completed" in done.stdout and "90.00 ±" in done.stdout
    for name, (_, _, reason) in DAMAGE.items():
        (line,) = [x for x in done.stdout.splitlines() if x.startswith(f"  runs/{name}: ")]
        assert reason in line
    assert "runs/pipe: result.json is no regular file" in done.stdout
    assert "runs/eval: an evaluation, not a training run" in done.stdout
    assert not (tmp_path / "pwned").exists()
    assert "runs/half_result" in (tmp_path / "report" / "report.html").read_text()


def test_a_log_with_a_broken_end_still_gives_its_curve(
    make: Callable[..., Path], metarun: Metarun
) -> None:
    folder = make("run")
    good = (folder / "metrics.jsonl").read_bytes()
    tail = b'{"step": 2200, "val/acc\n\x00\x00\x80\xff\n{"step": "x"}\n{"step": 1e999}\n[]\n'
    (folder / "metrics.jsonl").write_bytes(good + tail)
    done = metarun("report", "run")
    assert "run/metrics.jsonl: left out 5 lines that are no entries" in done.stderr
    (run,) = gather([folder]).runs
    assert [entry["step"] for entry in run.log] == list(range(200, 2001, 200))


HOSTILE = "</td><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


def test_the_page_in_a_browser(
    browser: Any, make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    for i, name in enumerate(("sgd", "adam", HOSTILE, r"$\frac{$ & -- ]]> `|`")):
        make(f"runs/{i}a", value=0.9 - 0.1 * i, settings={"inner_opt.name": name})
        make(f"runs/{i}b", value=0.8 - 0.1 * i, settings={"inner_opt.name": name}, seed=1)
    make("runs/bad", status="failed", error=f"RunError: {HOSTILE}")
    make(f"runs/{HOSTILE.replace('/', '')}", status="failed", error="\x1b[31mred")
    done = metarun("report", "runs")
    assert "\x1b" not in done.stdout
    page = tmp_path / "runs" / "report.html"
    browser.get_log("performance")
    browser.get(page.as_uri())
    assert browser.title == "Report on runs"
    assert browser.execute_script("return document.images.length") == 5
    for image in browser.find_elements(By.TAG_NAME, "img"):
        size = "return [arguments[0].naturalWidth, arguments[0].naturalHeight]"
        assert min(browser.execute_script(size, image)) > 100, image.get_attribute("alt")
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["params"]["request"]["url"] for event in asked]
    assert page.as_uri() in urls
    assert all(url == page.as_uri() or url.startswith("data:") for url in urls)

    table = browser.find_element(By.TAG_NAME, "table")
    heads = [cell.text for cell in table.find_elements(By.TAG_NAME, "th")]
    column = heads.index("test accuracy")

    def shown() -> list[str]:
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        return [row.find_elements(By.TAG_NAME, "td")[column].text[:5] for row in rows]

    assert shown() == ["85.00", "75.00", "65.00", "55.00"]
    table.find_elements(By.CSS_SELECTOR, "th button")[column].click()
    assert shown() == ["55.00", "65.00", "75.00", "85.00"]
    table.find_elements(By.CSS_SELECTOR, "th button")[column].click()
    assert shown() == ["85.00", "75.00", "65.00", "55.00"]

    for width in (1280, 360):
        set_width(browser, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    set_width(browser, 1280)


def test_two_hundred_runs_without_torch(
    make: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    for i in range(200):
        make(f"runs/{i}", value=0.5 + i / 1000, seed=i % 2,
             settings={"inner_opt.lr": 0.1 + i // 2 / 100})  # fmt: skip
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "metarun", "report", "runs"], cwd=tmp_path, check=True, text=True,
        env=environment | {"PYTHONPATH": str(tmp_path / "blocked")}, capture_output=True,
    )  # fmt: skip
    assert "200 runs: 200 completed" in done.stdout
    assert "… and 80 more, in report.md" in done.stdout
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "In colour the 7 best of 100 by validation, the others grey." in page
    assert len((tmp_path / "runs" / "report.md").read_text().splitlines()) > 100
    assert len(page) < 3_000_000


def test_settings_that_differ_are_shown_and_no_others() -> None:
    sgd = {"inner_opt.name": "sgd", "inner_opt.lr": 0.1, "inner_opt.momentum": 0.0, "seed": 1}
    adam = {"inner_opt.name": "adam", "inner_opt.lr": 0.1, "inner_opt.beta1": 0.9, "seed": 1}
    assert differing([sgd, adam]) == ["inner_opt.name"]
    faster = sgd | {"inner_opt.lr": 0.2}
    assert differing([sgd, adam, faster]) == ["inner_opt.name", "inner_opt.lr"]
    older = {key: value for key, value in sgd.items() if key != "inner_opt.momentum"}
    assert differing([sgd, older]) == ["inner_opt.momentum"], "nothing else tells them apart"
    assert differing([sgd]) == []
    turned = sgd | {"inner_opt.lr": 9.0, "augment.rotation": 30.0, "task.train.way": 10}
    assert differing([sgd, turned]) == ["inner_opt.lr", "augment.rotation", "task.train.way"]
    assert short_names(["inner_opt.name", "inner_opt.lr", "outer_opt.lr", "task.shot",
                        "augment.crop"]) == {
        "inner_opt.name": "inner_opt", "inner_opt.lr": "inner_opt.lr",
        "outer_opt.lr": "outer_opt.lr", "task.shot": "shot", "augment.crop": "augment.crop",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("report", "not given: the runs to report; usage: metarun report DIR"),
        ("report nowhere", "nowhere is not there: give run directories"),
        ("report . --open", "there is no option '--open'"),
        ("report . ou=x", "no setting 'ou' (did you mean out?)"),
        ("report . out=", "out= is empty"),
        ("report .", "there are no runs of metarun in ."),
        ("report . out=file", "out=file is no folder"),
        ("report file", "file is no directory: give run directories"),
    ],
)
def test_a_wrong_command_ends_with_one_clear_message(
    metarun: Metarun, tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    done = metarun(*arguments.split(), code=2)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_no_report_is_not_overwritten(
    make: Callable[..., Path], metarun: Metarun, tmp_path: Path
) -> None:
    make("run")
    (tmp_path / "run" / "report.md").write_text("my thesis")
    done = metarun("report", "run", code=2)
    assert "run/report.md is no report of metarun: choose another out=" in done.stderr
    assert (tmp_path / "run" / "report.md").read_text() == "my thesis"
    assert "written to" in metarun("report", "run", "out=elsewhere").stdout
    assert "usage: metarun report DIR" in metarun("report", "--help").stdout
