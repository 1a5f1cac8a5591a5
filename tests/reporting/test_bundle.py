"""A report for others: LaTeX, and runs in one file with a check that cannot be fooled by chance."""

import hashlib
import json
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from metarun.cli.report import check_bundle, main, parse, write_report
from metarun.errors import ConfigError, RunError
from metarun.reporting.bundle import RUN_FILES
from metarun.reporting.latex import escaped
from metarun.rundir.interval import half_width95
from tests.reporting.test_report_figures import Make, configs, make

__all__ = ["configs", "make"]  # fixtures


@pytest.fixture
def bundle(make: Make, tmp_path: Path) -> Path:
    """Two methods with two seeds each, and scores by task that give their figures."""
    rng = np.random.default_rng(0)
    for algo, level in (("maml", 0.9), ("anil", 0.8)):
        for seed in range(2):
            settings = {"algo.name": algo}
            folder = make(f"runs/{algo}{seed}", seed=seed, settings=settings, curve=(0.6, 0.7, 0.5))
            result = json.loads((folder / "result.json").read_text())
            scores = rng.normal(level, 0.05, 40)
            result["best"]["score"] = 0.7
            result["test"] |= {
                "accuracy": scores.mean(),
                "ci95": half_width95(scores.std(ddof=1), 40),
                "episodes": 40,
                "accuracy_per_task": scores.tolist(),
            }
            (folder / "result.json").write_text(json.dumps(result))
            own = {"host": "mine", "pid": 1, "argv": ["/home/me"], "versions": {"torch": "2"}}
            own |= {"earlier_attempts": [dict(own)]}
            (folder / "provenance.json").write_text(json.dumps(own))
    path = tmp_path / "paper.zip"
    write_report([tmp_path / "runs"], tmp_path / "out", path)
    return path


def changed(path: Path, change: Callable[[dict[str, bytes]], object], to: Path) -> Path:
    """The same zip file with other content, its manifest as it was."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(to, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return to


def with_digests(files: dict[str, bytes]) -> None:
    """Write a manifest that fits, as somebody would who wants to cheat."""
    listed = {n: hashlib.sha256(c).hexdigest() for n, c in files.items() if n != "manifest.json"}
    files["manifest.json"] = json.dumps({"metarun": "", "files": listed}).encode()


def edit(files: dict[str, bytes], name: str, change: Callable[[Any], object]) -> None:
    values = json.loads(files[name])
    change(values)
    files[name] = json.dumps(values).encode()


def test_a_bundle_is_checked_wherever_it_is(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = shutil.copy(bundle, tmp_path / "elsewhere.zip")
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    main([str(elsewhere)])
    said = capsys.readouterr().out
    assert "maml" in said and "differences, task by task" in said
    assert "the figures of 4 runs follow from 160 scores by task,\n" in said
    assert said.endswith("report.tex from them; report.html and report.md were not compared\n")


def test_a_changed_table_for_a_paper_is_found(bundle: Path, tmp_path: Path) -> None:
    def change(files: dict[str, bytes]) -> None:
        files["report.tex"] = files["report.tex"].replace(b"9", b"8", 1)
        with_digests(files)

    with pytest.raises(RunError, match=r"report\.tex is not what the runs give"):
        check_bundle(changed(bundle, change, tmp_path / "cheat.zip"))


def test_a_bundle_names_no_machine_and_no_folder(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        for name in archive.namelist():
            if name.endswith("provenance.json"):
                public = {"versions": {"torch": "2"}}
                assert json.loads(archive.read(name)) == public | {"earlier_attempts": [public]}
            if name.endswith("config.yaml"):
                assert yaml.safe_load(archive.read(name))["data"].get("root") is None
        kinds = {Path(name).name for name in archive.namelist() if name.startswith("runs/")}
        assert kinds == {*RUN_FILES}


RESULT = "runs/0000-anil0/result.json"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda f: edit(f, RESULT, lambda r: r["test"].update(accuracy=0.95)), "was changed"),
        (lambda f: f.pop(RESULT), "was changed: runs/0000-anil0/result.json"),
        (lambda f: f.update({"more.txt": b"x"}), "was changed: more.txt"),
        (lambda f: f.update({"../out.txt": b"x"}), "it has a file '../out.txt'"),
        (lambda f: f.pop("manifest.json"), "is no bundle of metarun report"),
        (lambda f: f.update({"manifest.json": b"[]"}), "is no bundle of metarun report"),
    ],
)
def test_what_was_changed_is_named(
    bundle: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], object], error: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_bundle(changed(bundle, change, tmp_path / "changed.zip"))
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda r: r["test"].update(accuracy=0.95), "anil0: accuracy 0.95, the mean of its tasks"),
        (lambda r: r["test"].update(ci95=0.001), "anil0: interval ± 0.001, of its tasks it is"),
        (lambda r: r["test"].update(episodes=41), "anil0: 40 scores by task, 41 tasks"),
        (lambda r: r["best"].update(score=0.99), "anil0: best validation 0.99, in its log it is"),
        (lambda r: r.update(train_seconds=1.0), "report.csv is not what the runs give"),
    ],
)
def test_a_figure_that_does_not_follow_is_found_behind_right_digests(
    bundle: Path, tmp_path: Path, change: Callable[[Any], object], error: str
) -> None:
    def cheat(files: dict[str, bytes]) -> None:
        edit(files, RESULT, change)
        with_digests(files)

    with pytest.raises(RunError) as raised:
        check_bundle(changed(bundle, cheat, tmp_path / "changed.zip"))
    assert error in str(raised.value)


def test_no_zip_file_and_other_mistakes_are_named(tmp_path: Path) -> None:
    other = tmp_path / "notes.zip"
    other.write_text("hello")
    with pytest.raises(ConfigError, match="is no bundle of metarun report"):
        check_bundle(other)
    with pytest.raises(ConfigError, match="leave out out="):
        parse([str(other), "out=x"])
    with pytest.raises(ConfigError, match="bundle= is empty: give a name"):
        parse(["bundle="])


def test_latex_shows_text_as_it_is(bundle: Path, tmp_path: Path) -> None:
    assert escaped("a_b & 5 % ± 1 {x} \\ $") == (r"a\_b \& 5 \% $\pm$ 1 \{x\} \textbackslash{} \$")
    assert escaped("[lr], p < 0.001") == "{[}lr], p $<$ 0.001"  # "[" ends no line's gap
    text = (tmp_path / "out" / "report.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows[:3]}) == 1  # as many columns
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    if shutil.which("pdflatex"):
        page = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + text
        (tmp_path / "page.tex").write_text(page + "\\end{document}\n")
        command = ["pdflatex", "-interaction=batchmode", "-halt-on-error", "page.tex"]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_long_names_leave_room_for_the_bars(make: Make, tmp_path: Path) -> None:
    for number, algo in enumerate(("maml", "anil")):
        settings = {"algo.name": algo, "inner_opt.lr": 0.123456 + number, "outer_opt.lr": 0.1}
        settings |= {"backbone.width": 16 + number, "inner_opt.momentum": 0.5 + number / 4}
        settings |= {"trainer.steps": 1234567 + number, "task.train.way": 20 + number}
        make(f"runs/{algo}", settings=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that was not found
        write_report([tmp_path / "runs"], tmp_path / "out")
