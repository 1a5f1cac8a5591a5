"""What the package uses of Hydra that Hydra does not promise to keep.

All of it comes by here, so this is where an upgrade of Hydra can break something;
`tests/config/test_hydra_door.py` says so.
"""

from functools import cache
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf as BasicSweeperConf
from hydra._internal.hydra import Hydra as Hydra
from hydra._internal.utils import get_args_parser as get_args_parser
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf


def basic_sweeper() -> Any:
    """The class of Hydra's sweeper.

    Hydra imports its plugins anew when it looks for them, and this class refers to itself by its
    module. So it has to be the one of the present module.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper


def forget_launcher(name: str) -> None:
    """Take a launcher that a package has stored out of the config store, if it is there."""
    ConfigStore.instance().repo["hydra"]["launcher"].pop(f"{name}.yaml", None)


def store_schema(group: str, name: str, schema: type, package: str) -> None:
    """Store a schema that becomes a config when Hydra first reads it.

    A command reads a few of some hundred, and each would take it a millisecond.
    """
    options = ConfigStore.instance().repo
    for part in group.split("/"):
        options = options.setdefault(part, {})
    options[f"{name}.yaml"] = _Schema(f"{name}.yaml", group, package, schema)


_as_config = cache(OmegaConf.structured)  # Hydra reads a copy of a node, so a node cannot keep it


class _Schema(ConfigNode):
    """A node of the store whose config is made when it is first asked for."""

    def __init__(self, name: str, group: str, package: str, schema: type) -> None:
        self.name, self.group, self.package, self.provider = name, group, package, None
        self._schema = schema
        self._node: DictConfig | None = None

    @property
    def node(self) -> DictConfig:
        return _as_config(self._schema) if self._node is None else self._node

    @node.setter
    def node(self, node: DictConfig) -> None:
        self._node = node
