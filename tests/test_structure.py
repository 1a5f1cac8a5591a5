"""The shape of the project: one-way imports, configs that match their schemas."""

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from metarun.config.catalogue import GROUPS, schemas
from tests.conftest import REPO

PACKAGE = REPO / "metarun"
ROOMS = [
    {"errors"},
    {"system"},
    {"unroll"},
    {"higher"},
    {"config"},
    {"episodes"},
    {"pictures"},
    {"rundir"},
    {"components"},
    {"training", "reporting"},
    {"inference"},
    {"sweeps"},
    {"reproduction"},
    {"cli"},
    {"__main__"},
]
"""From the bottom: a module imports from its own room, or from lower ones."""


ENGINE = [
    {"_torch", "advice", "names"},
    {"optim"},
    {"inputs", "hyper", "schedules", "effects", "corrected"},
    {"gradients"},
    {"multi", "recording"},
    {"path", "tasks"},
    {"engine"},
    {"look_ahead"},
]
"""The same within `metarun.unroll`."""


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(("package", "order"), [("metarun", ROOMS), ("metarun.unroll", ENGINE)])
def test_imports_go_one_way(package: str, order: list[set[str]]) -> None:
    rank = {name: level for level, names in enumerate(order) for name in names}
    known = {name for name in modules() if name.startswith(f"{package}.")}
    depth = package.count(".") + 1
    for name in known:
        part = name.split(".")[depth]
        for used in imports(modules()[name]) & known:
            other = used.split(".")[depth]
            assert other == part or rank[other] < rank[part], f"{name} imports {used}"


def test_the_engine_imports_nothing_else_of_metarun() -> None:
    for name, path in modules().items():
        if within(name, "metarun.unroll"):
            assert all(within(u, "metarun.unroll") for u in imports(path) & set(modules())), name


@pytest.mark.parametrize(
    "package", ["metarun.unroll", "metarun.components.algo", "metarun.components.backbone"]
)
def test_the_engine_and_the_components_know_nothing_of_hydra(package: str) -> None:
    for name, path in modules().items():
        if within(name, package) or within(name, "metarun.components.data"):
            roots = {used.partition(".")[0] for used in imports(path)}
            assert not roots & {"hydra", "omegaconf", "tensorboard"}, name


DOORS = {"metarun.unroll._torch", "metarun.config._hydra"}
"""The modules that may use what torch and Hydra do not promise to keep."""


def private_names(path: Path) -> set[str]:
    """What a module uses of torch or Hydra whose name begins with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            root, *parts = name.split(".")
            own = any(part.startswith("_") and not part.startswith("__") for part in parts)
            if root in ("torch", "hydra") and own:
                found.add(name)
    return found


def test_private_names_of_torch_and_hydra_come_by_their_doors() -> None:
    used = {name: private_names(path) for name, path in modules().items()}
    assert all(used[door] for door in DOORS), "the test sees what is private"
    assert {name: found for name, found in used.items() if found and name not in DOORS} == {}


def test_the_engine_needs_torch_only() -> None:
    others = ["hydra", "omegaconf", "torchvision", "tensorboard", "scipy", "safetensors"]
    imported = "import sys, metarun.unroll, metarun.higher"
    code = f"{imported}; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_of_tests_is_a_package() -> None:
    """Else pytest collects neither of two files of the same name."""
    for path in (REPO / "tests").rglob("test_*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_modules_stay_small() -> None:
    long = {n: len(p.read_text().splitlines()) for n, p in modules().items()}
    assert {n: lines for n, lines in long.items() if lines > 350} == {}


def test_every_component_has_a_config() -> None:
    for group in GROUPS:
        files = {p.stem for p in (REPO / "conf" / group).glob("*.yaml")}
        assert files == set(schemas(group))
        for name, schema in schemas(group).items():
            assert schema().name == name
            assert all(f.name == "name" or f.default is not ... for f in fields(schema))


def test_no_config_can_name_code() -> None:
    for path in (REPO / "conf").rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path
        OmegaConf.load(path)


AT_ONCE = (
    ["train", "--cfg", "job"],
    ["train", "algo=reptile", "data=omniglot", "--help"],
    ["train", "trainer.stepz=1"],
    ["eval", "--help"],
    ["eval", "ckpt=nowhere", "--cfg", "job"],
    ["predict", "--help"],
    ["predict", "ckpt=nowhere", "support=x", "query=[a,b]", "--cfg", "job"],
    ["export", "--help"],
    ["help", "eval"],
    ["completion", "bash"],
    ["completion", "candidates", "fish", "metarun train algo=an"],
    ["report", "nowhere"],
)


@pytest.mark.parametrize("arguments", AT_ONCE, ids=" ".join)
def test_what_answers_at_once_does_not_wait_for_torch(
    arguments: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    code = (
        "import sys; from metarun.cli.main import main; "
        f"sys.argv = ['metarun', *{arguments}]; main(); "
        "sys.stdout.flush(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.endswith("False\n"), done.stdout[-300:] + done.stderr
