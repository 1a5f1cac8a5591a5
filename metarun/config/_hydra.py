"""What the package uses of Hydra that Hydra does not promise to keep.

All of it comes by here, so this is where an upgrade of Hydra can break something;
`tests/config/test_hydra_door.py` says so.
"""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf as BasicSweeperConf
from hydra._internal.hydra import Hydra as Hydra
from hydra._internal.utils import get_args_parser as get_args_parser
from hydra.core.config_store import ConfigStore


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
