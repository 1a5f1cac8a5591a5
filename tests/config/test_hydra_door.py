"""What is used of Hydra beyond its promises does what the command line takes for granted."""

from hydra.core.config_store import ConfigStore

from metarun.config import _hydra as door


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
    assert hasattr(door.BasicSweeper, "sweep")
