"""What is used of Hydra beyond its promises does what the command line takes for granted."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from metarun.config import _hydra as door
from metarun.config.compose import register_schemas

BASIC = "hydra._internal.core_plugins.basic_sweeper"


def test_the_parser_knows_hydra_s_options() -> None:
    options = door.get_args_parser().parse_args(["-m", "--cfg", "job", "a=1", "b=2"])
    assert (options.multirun, options.cfg, options.overrides) == (True, "job", ["a=1", "b=2"])


def test_a_launcher_can_be_forgotten() -> None:
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="of_a_test", node={})
    assert "of_a_test.yaml" in store.repo["hydra"]["launcher"]
    door.forget_launcher("of_a_test")
    door.forget_launcher("of_a_test")
    assert "of_a_test.yaml" not in store.repo["hydra"]["launcher"]


def test_classes_are_those_that_are_meant() -> None:
    assert hasattr(door.Hydra, "compose_config")
    assert {"max_batch_size", "params"} <= set(door.BasicSweeperConf.__dataclass_fields__)
    assert door.basic_sweeper() is import_module(BASIC).BasicSweeper


def test_a_sweeper_can_be_made_after_hydra_has_looked_for_its_plugins() -> None:
    """It imports them anew, and a class of before does not fit its own module any more."""
    Plugins.instance()
    register_schemas()
    sweeper = import_module("hydra_plugins.metarun").GridSweeper(max_batch_size=None)
    assert isinstance(sweeper, door.basic_sweeper())


def test_a_schema_becomes_a_config_when_it_is_read() -> None:
    @dataclass
    class Of:
        made: ClassVar[int] = 0
        a: list[int] = field(default_factory=lambda: [Of.count()])

        @classmethod
        def count(cls) -> int:
            cls.made += 1
            return cls.made

    door.store_schema("of_a_test/deeper", "lazy", Of, "own")
    store = ConfigStore.instance()
    try:
        assert store.list("of_a_test/deeper") == ["lazy.yaml"] and Of.made == 0
        found = store.load("of_a_test/deeper/lazy.yaml")
        assert (found.node, found.package) == ({"a": [1]}, "own")
        found.node.a = [5]
        found.node = OmegaConf.create({})
        again = store.load("of_a_test/deeper/lazy.yaml")  # nobody changes what is stored
        assert (again.node, Of.made) == ({"a": [1]}, 1)
        assert OmegaConf.get_type(again.node) is Of
    finally:
        del store.repo["of_a_test"]
