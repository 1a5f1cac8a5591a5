"""What `--help` says: everything there is, in words, on a terminal's width."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metarun.cli import help as texts
from metarun.config.catalogue import GROUPS, schemas
from metarun.config.compose import composed
from metarun.reproduction.rows import experiment, rows
from tests.conftest import REPO, Metarun
from tests.setups import config_of

OF_ROWS = {experiment(row, budget) for row in rows().values() for budget in row.budgets}
EXPERIMENTS = {path.stem for path in (REPO / "conf" / "experiment").glob("*.yaml")} - OF_ROWS
COMPOSITIONS = [
    *([f"{group}={name}"] for group in GROUPS for name in schemas(group)),
    *([f"experiment={name}"] for name in sorted(EXPERIMENTS)),
]


def columns(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def test_every_option_has_a_line(metarun: Metarun) -> None:
    text = metarun("train", "--help").stdout
    for group in GROUPS:
        assert set(texts.options()[group]) == set(schemas(group))
    in_files = {
        str(path.relative_to(REPO / "conf").with_suffix(""))
        for path in (REPO / "conf").glob("**/*.yaml")
        if len(path.relative_to(REPO / "conf").parts) > 1
    }
    listed = {f"{g}/{name}" for g, described in texts.options().items() for name in described}
    assert listed == {name for name in in_files if not name.startswith("_")}
    for group, described in texts.options().items():
        for option, meaning in described.items():
            assert len(meaning.split()) > 1, option
            line = rf"^[* ] {group}={option}\s+{re.escape(meaning.split()[0])}"
            is_row = group == "experiment" and option in OF_ROWS
            assert bool(re.search(line, text, re.MULTILINE)) != is_row, option
    assert f"  experiment=…                  {len(OF_ROWS)} protocols of published" in text


@pytest.mark.parametrize("overrides", COMPOSITIONS, ids=" ".join)
def test_every_setting_is_explained(overrides: list[str]) -> None:
    config = config_of(*overrides)
    unexplained = [s.key for s in texts.settings(config) if not s.meaning]
    assert unexplained == [], "write a comment behind the field of the schema"
    text = texts.command_help("train", "", config)
    for setting in texts.settings(config):
        assert f"\n  {setting.typed()}" in text


def test_the_settings_of_eval_are_explained() -> None:
    assert [s.key for s in texts.settings(composed("eval", [])) if not s.meaning] == []


def test_help_is_of_the_command_that_was_typed(metarun: Metarun) -> None:
    text = metarun("train", "--help", "algo=anil", "data=omniglot", "seed=7").stdout
    assert re.search(r"^\* algo=anil ", text, re.MULTILINE)
    assert re.search(r"^  algo=maml ", text, re.MULTILINE)
    for setting in ("algo.adapt=[head.*]", "data.rotations=true", "seed=7"):
        assert f"\n  {setting} " in text
    assert "data.seed" not in text
    assert "did you mean algo=anil?" in metarun("train", "--help", "algo=anill", code=2).stderr


@pytest.mark.parametrize("width", [60, 80, 132])
def test_help_fits_the_terminal(metarun: Metarun, width: int) -> None:
    for command in ("train", "eval"):
        text = metarun(command, "--help", COLUMNS=str(width)).stdout
        assert columns(text) <= width
        assert columns(text) > 0.8 * min(width, 100)
    assert columns(metarun("train", "--help", "inner_opt=partition", COLUMNS="80").stdout) <= 80


def test_help_can_be_cut_short_and_shown_in_ascii(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "metarun", "eval", "--help"]
    read, write = os.pipe()
    os.close(read)  # as `| head` leaves it
    buffered = {key: value for key, value in environment.items() if key != "PYTHONUNBUFFERED"}
    cut = subprocess.run(command, env=buffered, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (cut.returncode, cut.stderr) == (1, b"")
    ascii_only = environment | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, env=ascii_only, cwd=tmp_path, capture_output=True)
    assert shown.returncode == 0 and b"[key=value ?]" in shown.stdout, shown.stderr


def test_help_is_a_command_as_well(metarun: Metarun) -> None:
    assert metarun("help", "eval").stdout == metarun("eval", "--help").stdout


def test_a_deleted_working_directory_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m metarun train trainer.steps=1"
    paths = [str(REPO), *filter(None, [environment.get("PYTHONPATH")])]
    env = environment | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "metarun: the current folder was deleted: cd to one that exists\n"
