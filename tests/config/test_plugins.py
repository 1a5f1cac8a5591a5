"""`+plugins=[…]` imports the user's module, or says why not."""

import shlex
from pathlib import Path

import pytest

from tests.conftest import Metarun

PLUGIN = """
from dataclasses import dataclass
from metarun.components.backbone.mlp import MLP
from metarun.components import register

@dataclass
class WideConfig:
    name: str = "wide"

register("backbone", "wide", WideConfig, lambda shape, outputs: MLP(shape, outputs, hidden=(3,)))
"""


def config(metarun: Metarun, name: str, code: int = 0, **env: str) -> str:
    """What a command with such a plugin says."""
    done = metarun("train", f"+plugins=[{name}]", "--cfg", "job", code=code, **env)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["statistics", "yaml", "numpy"])
def test_a_file_that_another_module_hides_is_not_passed_over(
    name: str, metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    said = config(metarun, name, code=2)
    assert f"another module has the name {name!r}" in said and "give yours another name" in said


def test_a_package_that_another_one_hides_is_not_passed_over(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "nets.py").write_text(PLUGIN)
    assert "another module has the name 'yaml'" in config(metarun, "yaml.nets", code=2)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("mine.py", "did you mean +plugins=[mine]?"),
        ("./mine.py", "did you mean +plugins=[mine]?"),
        ("sub/mine.py", "did you mean +plugins=[sub.mine]?"),
        ("sub/mine", "did you mean +plugins=[sub.mine]?"),
        ("/there/mine.py", "set PYTHONPATH=/there, and give +plugins=[mine]"),
    ],
)
def test_a_path_deserves_a_hint(typed: str, hint: str, metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    said = config(metarun, typed, code=2)
    assert "give the name of a module, not of a file" in said and hint in said


def test_modules_of_the_folder_and_below_are_imported(metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for path in ("mine.py", "sub/other.py"):
        (tmp_path / path).write_text(PLUGIN.replace("wide", path[0]))
    done = metarun("train", "+plugins=[mine,'sub.other']", "backbone=s", "--cfg", "job")
    assert "name: s" in done.stdout and "registers no component" not in done.stderr


def test_a_module_that_registers_nothing_is_named(metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text("x = 1\n")
    assert "the plugin 'idle' registers no component" in config(metarun, "idle")


def test_what_a_plugin_says_is_usual_is_set_or_named(metarun: Metarun, tmp_path: Path) -> None:
    text = PLUGIN.replace("    name", "    usual = {'trainer': {'meta_batch': 3}}\n    name")
    (tmp_path / "good.py").write_text(text)
    (tmp_path / "bad.py").write_text(text.replace("meta_batch", "meta_bach"))
    chosen = ("backbone=wide", "--cfg", "job")
    assert "meta_batch: 3" in metarun("train", "+plugins=[good]", *chosen).stdout
    said = metarun("train", "+plugins=[bad]", *chosen, code=2).stderr
    assert "backbone=wide: trainer.meta_bach" in said and "did you mean trainer.meta_batch?" in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("x = = 1", "SyntaxError"),
    ],
)
def test_a_module_that_fails_says_why(
    text: str, reason: str, metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(text)
    said = config(metarun, "bad", code=2)
    assert f"cannot import the plugin 'bad': {reason}" in said
    said = config(metarun, "nowhere", code=2)
    assert f"a plugin is an installed module or a file in {tmp_path}" in said


ODD = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from metarun.components import register

@dataclass
class OddConfig:
    name: str = "odd"
    what: str = ""

outside = torch.ones(1, requires_grad=True)
odd = {
    "constant": lambda x: torch.special.bessel_j0(x),
    "renormed": lambda x: F.embedding((x > 0).long()[:, 0], torch.eye(2), max_norm=1.0) * x,
    "outside": lambda x: outside * x,
    "second": lambda x: F.hardsigmoid(x),
}

class Odd(nn.Module):
    batch_norm = "none"

    def __init__(self, what):
        super().__init__()
        self.what, self.body = what, nn.Linear(1, 1)

    def forward(self, x):
        return self.body(x) + odd[self.what](self.body(x)).sum()

register("backbone", "odd", OddConfig, lambda shape, outputs, what: Odd(what))
"""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("constant", "bessel_j0 for a constant"),
        ("renormed", "max_norm"),
        ("outside", "requires gradients"),
        ("second", "hardsigmoid"),
    ],
)
def test_what_a_network_cannot_do_is_told_without_surprise(
    metarun: Metarun, tmp_path: Path, what: str, message: str
) -> None:
    """The words of the unroll are meant for whoever wrote the network."""
    (tmp_path / "odd.py").write_text(ODD)
    done = metarun(
        "train", "data=sinusoid", "+plugins=[odd]", "backbone=odd", f"backbone.what={what}",
        "engine.gradient=checkpoint", "trainer.steps=2", "engine.compile=none",
        "trainer.eval_episodes=4", "trainer.test_episodes=4", code=1,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if line.startswith("metarun: ")]
    assert message in told[0] and "unexpected" not in done.stderr


def test_the_next_command_names_the_plugins_too(metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(PLUGIN)
    small = ("trainer.steps=2", "trainer.eval_episodes=4", "trainer.test_episodes=4")
    given = ("data=sinusoid", "+plugins=[wide]", "backbone=wide", "hydra.run.dir=run")
    done = metarun("train", *given, *small)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: metarun ")]
    command = shlex.split(line.removeprefix("next: metarun "))
    assert command == ["eval", "+plugins=[wide]", "ckpt=run", "episodes=1000"]
    metarun(*command[:-1], "episodes=4")
