"""A component is one file: what is read of it without importing it is what it is."""

import importlib
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest

from metarun.components.algo.maml import MamlConfig
from metarun.config.catalogue import GROUPS, builder, components, read, schemas, source_of
from metarun.config.component import as_keywords, builds, choices_of, settings
from metarun.errors import ConfigError
from scripts import write_conf
from tests.conftest import REPO

EVERY = [(group, name) for group in GROUPS for name in schemas(group)]

COMPARE = """
import importlib, json, sys
from dataclasses import asdict, fields
from metarun.config.catalogue import HOME, GROUPS, components, read, source_of
from metarun.config.component import choices_of

def shape(kind):
    return [(f.name, str(f.type)) for f in fields(kind)], asdict(kind()), choices_of(kind)

read_first = sys.argv[1] == "read"
found = {}
for group in GROUPS:
    for name, one in components(group).items():
        module = f"{HOME}{group}.{name}"
        if read_first:
            assert "torch" not in sys.modules, f"reading {module} imported torch"
        found[f"{group}={name}"] = repr(shape(one.schema))
        if not read_first:
            real = importlib.import_module(module)
            assert getattr(real, one.schema.__name__) is one.schema, module
print(json.dumps(found))
"""


def test_what_is_read_is_what_is_imported() -> None:
    """Read without importing anything of it, and imported, in processes of their own."""
    said = [
        subprocess.run(
            [sys.executable, "-c", COMPARE, how], capture_output=True, text=True, check=True
        ).stdout
        for how in ("read", "import")
    ]
    assert said[0] == said[1] and len(eval(said[0])) == len(EVERY)


def test_a_file_that_is_imported_first_has_the_same_class() -> None:
    code = (
        "import metarun.components.algo.anil as anil, metarun.components.algo.maml as maml\n"
        "from metarun.config.catalogue import schemas\n"
        "known = schemas('algo')\n"
        "assert (known['anil'], known['maml']) == (anil.AnilConfig, maml.MamlConfig)\n"
        "assert issubclass(anil.AnilConfig, maml.MamlConfig)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_its_place_is_its_name_and_its_first_line_says_what_it_is(group: str, name: str) -> None:
    module = importlib.import_module(f"metarun.components.{group}.{name}")
    schema = schemas(group)[name]
    assert schema().name == name == builder(group, name).__name__
    assert schema.__module__ == module.__name__ and module.__doc__
    assert inspect.getsource(schema).rstrip() == "@settings\n" + source_of(schema).rstrip()


def test_the_files_in_conf_are_those_that_the_script_writes() -> None:
    assert write_conf.stale() == {}, "run python scripts/write_conf.py"


def test_every_setting_is_in_its_yaml_with_its_meaning() -> None:
    for group, name in EVERY:
        lines = (REPO / "conf" / group / f"{name}.yaml").read_text().splitlines()
        for field in fields(schemas(group)[name]):
            own = [line for line in lines if line.lstrip().startswith(f"{field.name}:")]
            assert field.name == "name" or (len(own) == 1 and "  # " in own[0]), (name, field.name)


def test_a_library_call_takes_keywords_or_the_settings() -> None:
    made = builder("inner_opt", "sgd")
    config = schemas("inner_opt")["sgd"]
    assert made(lr=0.3).hyper == made(config(lr=0.3)).hyper
    assert made().hyper["lr"] == config().lr
    with pytest.raises(TypeError, match="steps"):
        made(steps=3)


def test_choices_belong_to_the_field() -> None:
    assert choices_of(MamlConfig)["order"] == (1, 2)
    with pytest.raises(ConfigError, match=r"algo\.order=3: choose one of 1, 2"):
        MamlConfig(order=3)  # type: ignore[arg-type]
    hints = {f.name: f.type for f in fields(MamlConfig)}
    assert (hints["order"], hints["reduction"]) == (int, str)  # what Hydra understands


def test_settings_of_a_plugin() -> None:
    @settings
    class Base:
        mode: Literal["a", "b"] | None = None  # a choice, or none

        def __post_init__(self) -> None:
            self.looked = True

    @settings
    class Derived(Base):
        also: Literal["c"] = "c"

    @builds(Derived)
    def made(x: int, own: Derived) -> tuple[int, dict[str, Any]]:
        return x, as_keywords(own)

    assert Derived().looked and choices_of(Derived) == {"mode": ("a", "b"), "also": ("c",)}
    for wrong in ({"mode": "c"}, {"also": "a"}):
        with pytest.raises(ConfigError, match="choose one of"):
            Derived(**wrong)  # type: ignore[arg-type]
    assert made(1, mode="b") == (1, {"mode": "b", "also": "c"}) == made(1, Derived(mode="b"))


def test_reading_follows_what_settings_need(tmp_path: Path, monkeypatch: Any) -> None:
    """Constants, functions and imports, also through others; nothing else is executed."""
    folder = tmp_path / "algo"
    folder.mkdir()
    (folder / "base.py").write_text(
        "import no_such_module\n"
        "from metarun.config.component import settings\n"
        "MOST = 3\n"
        "def double(x): return 2 * x\n"
        "@settings\nclass BaseConfig:\n    '''Base.'''\n    size: int = double(MOST)\n"
    )
    (folder / "mine.py").write_text(
        "from no_such_module import net\n"
        "from metarun.components.algo.base import BaseConfig as Base, other\n"
        "from metarun.config.component import builds, settings\n"
        "raise_here = net()\n"
        "@settings\nclass MineConfig(Base):\n    '''Mine.'''\n    more: int = 1  # meaning\n"
        "@builds(MineConfig)\ndef mine(problem, own): ...\n"
    )
    monkeypatch.setattr("metarun.config.catalogue._FOLDER", tmp_path)
    components.cache_clear()
    read.cache_clear()
    try:
        schema = components("algo")["mine"].schema
        assert (schema().name, schema().size, schema().more) == ("mine", 6, 1)
        assert source_of(schema).endswith("more: int = 1  # meaning")
    finally:
        components.cache_clear()
        read.cache_clear()


def test_settings_travel_by_their_names() -> None:
    """To another process, as a launcher sends them: there they are the classes of their files."""
    send = (
        "import sys, cloudpickle\n"
        "from metarun.config.catalogue import import_files, schemas\n"
        "import_files()\n"
        "sys.stdout.buffer.write(cloudpickle.dumps(schemas('algo')['maml'](inner_steps=7)))"
    )
    receive = (
        "import pickle, sys\n"
        "found = pickle.load(sys.stdin.buffer)\n"
        "from metarun.config.catalogue import schemas\n"
        "assert type(found) is schemas('algo')['maml'] and found.inner_steps == 7"
    )
    sent = subprocess.run([sys.executable, "-c", send], capture_output=True, check=True)
    subprocess.run([sys.executable, "-c", receive], input=sent.stdout, check=True)
