"""Every example in a docstring of the package, and of the program that builds its site, runs."""

import ast
import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import metarun
from tests.conftest import REPO

RUN = "outputs/train/mine"
"""Examples that name it get a trained run there, and pictures of two classes beside it."""


def examples() -> Iterator[doctest.DocTest]:
    for folder in ("metarun", "scripts/site"):
        for path in sorted((REPO / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if ">>>" in text else ():
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    name = f"{path.relative_to(REPO)}:{getattr(node, 'name', 'module')}"
                    written = ast.get_docstring(node) or ""
                    # The globals are empty: an example must import what it uses.
                    yield doctest.DocTestParser().get_doctest(written, {}, name, str(path), None)


EXAMPLES = [example for example in examples() if example.examples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("examples")
    for name in ("cat1", "new"):
        Image.radial_gradient("L").save(made / f"{name}.png")
    for name in ("dog1", "dog2"):
        Image.linear_gradient("L").save(made / f"{name}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METARUN_CACHE", str(cache))
        metarun.train(
            "algo=protonet", "data=glyphs", "backbone.width=4", "backbone.norm=support",
            "trainer.steps=1", "trainer.eval_episodes=2", "trainer.test_episodes=2", "device=cpu",
            f"hydra.run.dir={made / RUN}",
        )  # fmt: skip
        yield made


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_run(
    example: doctest.DocTest,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs_a_run = RUN in (example.docstring or "")
    monkeypatch.chdir(request.getfixturevalue("folder") if needs_a_run else tmp_path)
    report: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


def test_the_examples_are_found() -> None:
    names = {example.name for example in EXAMPLES}
    assert len(names) > 70
    for place in ("metarun/cli/functions.py:train", "metarun/unroll/engine.py:unroll"):
        assert place in names
