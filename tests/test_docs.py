"""The code of the documentation runs as it stands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

from metarun.config.catalogue import schemas
from tests.conftest import REPO

ELSEWHERE = {"components.md"}  # whose files test_components_page.py puts into their places
PAGES = [
    page
    for page in sorted((REPO / "docs").rglob("*.md"))
    if "```python" in page.read_text() and page.name not in ELSEWHERE
]
NOTEBOOKS = sorted((REPO / "docs" / "tutorials").glob("*.ipynb"))


@pytest.fixture
def elsewhere(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code runs in a folder of its own, and draws on no screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METARUN_CACHE", str(cache))
    matplotlib.use("Agg")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("elsewhere")
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    text = page.read_text()
    namespace: dict[str, object] = {}
    for block in re.finditer(r"```python\n(.*?)```", text, flags=re.S):
        lines_before = text[: block.start(1)].count("\n")  # so that errors name the page's line
        exec(compile("\n" * lines_before + block.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize(
    ("group", "page"),
    [("algo", "docs/algorithms.md"), ("backbone", "docs/backbones.md"), ("data", "README.md")],
)
def test_every_component_is_named_where_people_look_for_it(group: str, page: str) -> None:
    text = (REPO / page).read_text()
    missing = [n for n in schemas(group) if f"`{n}`" not in text and f"`{n} " not in text]
    assert not missing


def test_the_tutorials_are_among_the_pages() -> None:
    assert {"unroll.md", "from_higher.md", "own_pictures.md"} <= {page.name for page in PAGES}


def cells(notebook: Path, kind: str) -> Iterator[dict[str, object]]:
    return (c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
@pytest.mark.usefixtures("elsewhere")
def test_the_cells_of_a_notebook_run_from_top_to_bottom(notebook: Path) -> None:
    namespace: dict[str, object] = {}
    for number, cell in enumerate(cells(notebook, "code"), 1):
        code = "".join(cell["source"])  # type: ignore[arg-type]
        exec(compile(code, f"{notebook}, code cell {number}", "exec"), namespace)


def test_there_are_notebooks_without_outputs() -> None:
    assert len(NOTEBOOKS) >= 4
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "code"):
            assert cell["outputs"] == [] and cell["execution_count"] is None, notebook
