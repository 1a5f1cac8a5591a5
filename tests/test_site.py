"""The site of the documentation: whole, and at home on a disk."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import metarun
from metarun import components, higher, unroll
from metarun.config.catalogue import GROUPS, schemas
from metarun.unroll import optim
from tests.browser import browser  # noqa: F401
from tests.conftest import REPO

CONFIG = REPO / "scripts" / "site" / "mkdocs.yml"
TEXTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
API = "\n".join(page.read_text() for page in (REPO / "docs" / "api").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as `make docs` does, but for what the notebooks' cells print."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", str(CONFIG), "-d", str(folder)],
        env=os.environ | {"EXECUTE_NOTEBOOKS": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """The addresses of what a page loads: scripts, styles, pictures, frames."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        loads = tag != "link" or own.get("rel") not in ("canonical", "next", "prev")
        address = own.get("src") or (own.get("href") if tag == "link" and loads else None)
        if address:
            self.addresses.append(address)


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        addresses = Loaded(page.read_text()).addresses
        assert addresses, page
        for address in addresses:
            assert "//" not in address, f"{page} loads {address}"
            assert (page.parent / address.partition("?")[0].partition("#")[0]).exists() or (
                page.name == "404.html"  # whose addresses begin with that of the site
            ), f"{page} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:", style.read_text()), style


def test_the_search_index_lies_in_a_script_and_knows_all_kinds_of_pages(site: Path) -> None:
    found = json.loads(
        (site / "search" / "search_index.js").read_text().removeprefix("var __index = ")
    )
    entries = {entry["location"]: entry["text"] for entry in found["docs"]}
    for location in (
        "report.html#differences",  # a page
        "tutorials/decide.html#2-a-report",  # a notebook
        "api/unroll.html#metarun.unroll.unroll",  # a docstring
        "api/algo.html#metarun.components.algo.maml.MamlConfig",  # settings
    ):
        assert location in entries
    assert "inner_steps" in entries["api/algo.html#metarun.components.algo.maml.MamlConfig"]


def test_the_search_works_in_a_page_that_is_opened_as_a_file(
    site: Path,
    browser: webdriver.Chrome,  # noqa: F811
) -> None:
    browser.get((site / "index.html").as_uri())
    box = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    box.send_keys("conformal prediction")
    results = WebDriverWait(browser, 30).until(
        lambda chrome: chrome.find_elements(By.CSS_SELECTOR, "a.md-search-result__link")
    )
    assert "own_pictures.html" in str(results[0].get_attribute("href"))
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_every_component_and_its_settings_are_shown(site: Path) -> None:
    for group in GROUPS:
        text = (site / "api" / f"{group}.html").read_text()
        for name, schema in schemas(group).items():
            assert f'id="metarun.components.{group}.{name}.{schema.__name__}"' in text
            for field in fields(schema):
                assert field.name == "name" or f"<code>{field.name}</code>" in text, field.name
        assert f'id="metarun.components.{group}.base"' not in text, "what they share is no option"


@pytest.mark.parametrize(
    ("module", "path"),
    [
        (metarun, "metarun"),
        (unroll, "metarun.unroll"),
        (higher, "metarun.higher"),
        (components, "metarun.components"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_exported_has_a_place_in_the_reference(module: ModuleType, path: str) -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", API, flags=re.MULTILINE))
    for name in module.__all__:
        if not isinstance(getattr(module, name), ModuleType):
            assert {f"{path}.{name}", f"{path}.{name}.{name}"} & shown, name


def test_functions_for_optimizers_of_ones_own_are_shown() -> None:
    for name in set(optim.__all__) - set(unroll.__all__):
        assert name.endswith("State") or f"::: metarun.unroll.optim.{name}\n" in API, name


# ---------------------------------------------------------------- links, as the hoster shows them


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, by the hoster's rule."""
    text = re.sub(r"^(```|~~~~).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in plain}


def links() -> Iterator[tuple[Path, str]]:
    for page in TEXTS:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`]*`", "", text)
        yield from ((page, target) for target in re.findall(r"\]\(([^)\s]+)\)", text))
    for page in sorted((REPO / "docs").rglob("*.ipynb")):
        cells = json.loads(page.read_text())["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        yield from ((page, target) for target in re.findall(r"\]\(([^)\s]+)\)", text))


def test_links_between_pages_lead_somewhere() -> None:
    inside = [(page, target) for page, target in links() if "://" not in target]
    assert len(inside) > 100, "the test sees the links"
    for page, target in inside:
        path, _, anchor = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(other), f"{page.name}: {target}"
