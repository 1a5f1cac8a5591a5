"""The code of the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

from metarun.config.catalogue import schemas
from tests.conftest import REPO

ELSEWHERE = {"components.md"}  # whose files test_components_page.py puts into their places
PAGES = [
    page
    for page in sorted((REPO / "docs").glob("*.md"))
    if "```python" in page.read_text() and page.name not in ELSEWHERE
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(cache))
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
