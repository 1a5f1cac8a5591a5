"""What MkDocs does besides: notebooks become pages, with what their cells print and draw.

A notebook is executed while the site is built, then turned into Markdown. Its links, headings and
words are thus checked and searched like those of any page.
"""

import base64
import logging
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient

log = logging.getLogger("mkdocs.hooks")

ASSETS = ("iframe-worker.js", "site.css")
QUIET = ["--log-level=ERROR"]  # a kernel warns that it listens on local ports


class Notebook(File):
    """A page that is written as a notebook."""

    def is_documentation_page(self) -> bool:
        """Whether it is a page; MkDocs takes only Markdown for pages."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put pages in the place of notebooks, their pictures beside them, and add our assets."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            place = PurePosixPath(file.src_uri)
            notebook = nbformat.read(file.abs_src_path, as_version=4)
            if config.extra["execute_notebooks"]:
                log.info("Executing %s", file.src_uri)
                execute(notebook)
            text, pictures = as_markdown(notebook, place.stem)
            files.remove(file)
            files.append(Notebook.generated(config, file.src_uri, content=text))
            for name, data in pictures.items():
                files.append(File.generated(config, str(place.with_name(name)), content=data))
    for name in ASSETS:
        path = str(Path(__file__).with_name(name))
        files.append(File.generated(config, f"assets/{name}", abs_src_path=path))
    return files


def execute(notebook: Any) -> None:
    """Give the cells of a notebook their outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    with TemporaryDirectory() as folder:  # where its cells write what they write
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, resources=place, extra_arguments=QUIET).execute()


def as_markdown(notebook: Any, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, without what its cells write to stderr: progress.

    Args:
        notebook: in version 4 of the format, with the outputs of its cells.
        stem: begins the names of its pictures.

    Returns:
        The text, and the PNG files that it shows, by name.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(fenced(cell.source, "python"))
        if printed := "".join(o.text for o in cell.outputs if o.get("name") == "stdout"):
            parts.append(fenced(printed.rstrip("\n"), "text"))
        for data in (output.data for output in cell.outputs if "data" in output):
            if "image/png" in data:
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![what the code above draws]({name})")
            else:
                parts.append(fenced(data["text/plain"], "text"))
    return "\n\n".join(parts) + "\n", pictures


def fenced(text: str, language: str) -> str:
    """A block of code."""
    return f"~~~~{language}\n{text}\n~~~~"
