"""Hydra's launchers and sweepers as metarun offers them: which there are, what they need.

Those that need an extra package are known by name without it, so that a user is told what to
install. The classes are in `hydra_plugins.metarun`, where Hydra looks for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin

from metarun.config._hydra import BasicSweeperConf, forget_launcher
from metarun.errors import ConfigError

NEEDS = {
    "hydra/launcher=joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "hydra/launcher=submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "hydra/launcher=submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "hydra/sweeper=optuna": ("optuna", "optuna"),
}
"""Choice -> the module that it needs, and the extra of metarun's that installs it."""


@dataclass
class GridConfig(BasicSweeperConf):
    """Every combination of the values given."""

    _target_: str = "hydra_plugins.metarun.GridSweeper"


@dataclass
class OptunaConfig:
    """A search for the best validation score."""

    _target_: str = "hydra_plugins.metarun.OptunaSweeper"
    n_trials: int = 20  # in all, those of earlier calls on the same sweep directory included
    n_jobs: int = 1  # trials at a time, if the launcher runs several
    sampler: str = "tpe"  # tpe or random
    seed: int = 0  # of the sampler
    params: dict[str, str] | None = None  # search space, besides that of the command line


def register() -> None:
    """Tell Hydra the launchers and sweepers whose packages are installed."""
    plugins = Plugins.instance()  # first: it imports whatever is in hydra_plugins, once more
    from hydra_plugins import metarun as ours

    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="grid", node=GridConfig)
    store.store(group="_schema/sweeper", name="optuna", node=OptunaConfig, package="hydra.sweeper")
    nodes: dict[str, Any] = {}
    classes: list[type[Plugin]] = [ours.GridSweeper, ours.OptunaSweeper]
    if _installed("hydra_plugins.hydra_joblib_launcher"):
        from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

        nodes["joblib"] = JobLibLauncherConf
    if _installed("hydra_plugins.hydra_submitit_launcher"):
        from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

        from hydra_plugins.metarun import _submitit

        module = _submitit.__name__
        nodes["submitit_local"] = LocalQueueConf(_target_=f"{module}.LocalLauncher")
        nodes["submitit_slurm"] = SlurmQueueConf(_target_=f"{module}.SlurmLauncher")
        classes += [_submitit.LocalLauncher, _submitit.SlurmLauncher]
    for kind in classes:
        plugins.register(kind)  # Hydra does not find them in an editable install
    for name, node in nodes.items():
        store.store(group="_schema/launcher", name=name, node=node, package="hydra.launcher")
        # conf/hydra/launcher has an option of this name, which Hydra would merge with theirs.
        forget_launcher(name)


def check_installed(overrides: Sequence[str]) -> None:
    """Refuse the choice of a launcher or sweeper whose package is missing.

    Raises:
        ConfigError: says what to install.
    """
    for override in overrides:
        if override not in NEEDS:
            continue
        module, extra = NEEDS[override]
        if not _installed(module):
            raise ConfigError(
                f"{override} needs a package that is not installed: pip install 'metarun[{extra}]'"
            )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False
