"""Weights & Biases, if `trainer.wandb` asks for it."""

import re
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from metarun.errors import ConfigError, RunError
from metarun.rundir.metrics import ELAPSED
from metarun.system.files import write_text
from metarun.training.loggers.base import Logged, Record


def require_wandb(mode: str) -> None:
    """Refuse a mode other than "off" where the package is missing.

    Raises:
        ConfigError: names the extra to install.
    """
    if mode == "off":
        return
    try:
        version("wandb")  # not find_spec: a folder `wandb` with old runs would do for that
    except PackageNotFoundError as error:
        raise ConfigError(
            f"trainer.wandb={mode} needs Weights & Biases: pip install 'metarun[wandb]'"
        ) from error


class Wandb:
    """One W&B run for a run directory, the same one after a kill.

    Raises:
        RunError: W&B cannot be reached, or nobody has logged in.
    """

    def __init__(self, run: Logged, mode: Literal["online", "offline"], project: str) -> None:
        import wandb  # slow, and not everybody has it

        (run.directory / "wandb").mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=project,
                id=_run_id(run.directory / "wandb" / "id"),
                resume="allow",
                name=run.directory.name,
                dir=run.directory,
                mode=mode,
                config=dict(run.settings),
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"Weights & Biases does not start ({error}): `wandb login` once, or use "
                "trainer.wandb=offline"
            ) from error
        # Not W&B's own step, which must grow: a resumed run logs some meta-steps again.
        self._run.define_metric("meta_step", hidden=True)
        self._run.define_metric("inner_step", hidden=True)
        self._run.define_metric("*", step_metric="meta_step")

    def repeat(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Log again what W&B's server does not have.

        A kill loses what W&B had not sent or written yet: offline that may be all of it, so
        there each attempt's folder has the whole log.
        """
        has = self._run.summary.get("meta_step")
        for entry in log:
            if not isinstance(has, int) or entry["step"] >= has:
                values = {tag: v for tag, v in entry.items() if tag not in ("step", ELAPSED)}
                self.metrics(entry["step"], values)

    def metrics(self, step: int, values: Record) -> None:
        known = {tag: value for tag, value in values.items() if value is not None}
        self._run.log({"meta_step": step, **known})

    def final(
        self, figures: Mapping[str, float], curves: Mapping[str, Sequence[float]], step: int
    ) -> None:
        for tag, values in curves.items():
            self._run.define_metric(tag, step_metric="inner_step")
            for inner_step, value in enumerate(values):
                self._run.log({"inner_step": inner_step, tag: value})
        self._run.summary.update(dict(figures))

    def close(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


def _run_id(path: Path) -> str:
    """The id that an earlier attempt stored, else a new one."""
    if path.exists():
        stored = path.read_text(errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{16}", stored):
            return stored
    new = secrets.token_hex(8)
    write_text(path, new + "\n")
    return new
