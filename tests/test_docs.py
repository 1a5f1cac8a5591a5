"""The code of the documentation runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPO, Metarun

PAGES = [p for p in sorted((REPO / "docs").glob("*.md")) if "```python" in p.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, object] = {}
    for block in re.finditer(r"```python\n(.*?)```", text, flags=re.S):
        lines_before = text[: block.start(1)].count("\n")  # so that errors name the page's line
        exec(compile("\n" * lines_before + block.group(1), str(page), "exec"), namespace)


def test_the_tutorials_are_among_the_pages() -> None:
    assert {"unroll.md", "from_higher.md"} <= {page.name for page in PAGES}


def test_the_component_of_contributing_trains(metarun: Metarun, tmp_path: Path) -> None:
    text = (REPO / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "sign.py").write_text(code)
    (typed,) = re.findall(r"`metarun (train '\+plugins=.*?)`", text)
    short = ("data=sinusoid", "backbone=mlp", "trainer.steps=2", "trainer.test_episodes=2")
    assert "test mse" in metarun(*shlex.split(typed), *short).stdout
    assert "the length" in metarun(*shlex.split(typed), "--help").stdout
