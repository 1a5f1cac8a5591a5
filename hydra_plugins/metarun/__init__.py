"""metarun's sweepers, where Hydra looks for plugins; the work is done in `metarun.sweeps.sweep`."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from metarun.config._hydra import basic_sweeper
from metarun.errors import ConfigError


class GridSweeper(basic_sweeper()):  # type: ignore[misc]
    """Every combination of the values; see `metarun.sweeps.sweep`."""

    def sweep(self, arguments: list[str]) -> None:
        """Run what is missing of the combinations and report how all of them ended."""
        from metarun.sweeps.sweep import (
            Sweep,  # here: Hydra imports every plugin whatever the command
        )

        assert self.config is not None
        assert self.hydra_context is not None and self.launcher is not None
        loader = self.hydra_context.config_loader
        given = OverridesParser.create(config_loader=loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        for override in given:
            if override.is_interval_sweep():
                raise ConfigError(
                    f"{override.input_line}: an interval is for a search: add "
                    "hydra/sweeper=optuna, or give the values, as key=a,b,c"
                )
        _refuse_empty(given)
        batches = self.split_arguments(given, self.max_batch_size)
        varying = [o.get_key_element() for o in given if o.is_sweep_override()]
        sweep = Sweep(self.config, loader, self.launcher, varying)
        planned = [[sweep.add(overrides) for overrides in batch] for batch in batches]
        sweep.refuse_if_nothing_can_start()
        for jobs in planned:
            sweep.launch(jobs)
        sweep.finish()


class OptunaSweeper(Sweeper):
    """A search with Optuna; see `metarun.sweeps.search`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember what the search needs, and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are missing and report the best."""
        from metarun.sweeps.search import search
        from metarun.sweeps.sweep import Sweep

        assert self.config is not None
        assert self.hydra_context is not None and self.launcher is not None
        loader = self.hydra_context.config_loader
        space = [f"{key}={value}" for key, value in (self.settings["params"] or {}).items()]
        given = OverridesParser.create(config_loader=loader).parse_overrides([*space, *arguments])
        _refuse_empty(given)
        varying = [o.get_key_element() for o in given if o.is_sweep_override()]
        sweep = Sweep(self.config, loader, self.launcher, varying)
        search(sweep, given, self.settings)


def _refuse_empty(given: Sequence[Override]) -> None:
    """Refuse a sweep over a setting without a value: `range(3,1)`, `glob(none*)`.

    Raises:
        ConfigError: names it.
    """
    for override in given:
        if not override.is_sweep_override() or override.is_interval_sweep():
            continue
        try:
            empty = not list(override.sweep_string_iterator())
        except ValueError as error:  # range(0,1,0)
            raise ConfigError(f"{override.input_line}: {error}") from error
        if empty:
            what = "matches no option" if isinstance(override.value(), Glob) else "has no values"
            raise ConfigError(
                f"{override.input_line} {what}: range(first,end) goes from first to below end, as "
                "range(0,3) does to 2; values one by one are written key=a,b,c"
            )
