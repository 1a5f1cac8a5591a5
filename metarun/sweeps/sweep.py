"""A sweep: many runs, each with a directory of its own, of which none stops the others.

The sweep's directory holds one run directory a combination, named after the values that vary,
and `sweep.json`. Each run is idempotent, so the same command with the same directory runs what
is missing or unfinished, on whatever launcher.
"""

import copy
import hashlib
import json
import logging
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from metarun.config.catalogue import import_files
from metarun.config.compose import to_config
from metarun.config.run import TrainConfig
from metarun.config.typed import quoted, without_interpolations
from metarun.errors import ConfigError, RunError
from metarun.rundir import SWEEP_FILE
from metarun.sweeps.job import Outcome, code_state, describe, to_go_on
from metarun.system.files import write_json, write_text
from metarun.system.interrupts import terminable

log = logging.getLogger(__name__)

NAME_LENGTH = 120  # of a run directory's name; file systems allow 255 bytes
IN_BASE = ("algo", "data", "seed")
"""Settings that conf/train.yaml has in `hydra.sweep.subdir`, whether they vary or not."""

TRACES = ("status.json", "checkpoints", "metrics.jsonl")
"""What a run leaves once it has started; a launch by itself leaves `config.yaml` only."""


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        overrides: what the command line would be for this run alone.
        directory: the run directory.
        config: the resolved config as plain values; None for a command whose runs are not kept
            up (`metarun eval`).
        outcome: how it ended, or None as long as it has not.
    """

    overrides: list[str]
    directory: Path
    config: dict[str, Any] | None
    outcome: Outcome | None = None


class Sweep:
    """The runs of one call of the command line, planned, launched and reported.

    Args:
        config: Hydra's config of the sweep as a whole.
        loader: composes the config of one run.
        launcher: runs jobs, here or elsewhere, and waits for them.
        varying: keys whose values differ between the runs.
    """

    def __init__(
        self,
        config: DictConfig,
        loader: ConfigLoader,
        launcher: Launcher,
        varying: Collection[str],
    ) -> None:
        self.directory = Path(str(config.hydra.sweep.dir))
        self.jobs: dict[Path, Job] = {}
        self._config, self._loader, self._launcher = config, loader, launcher
        self._varying = sorted({_plain_key(key) for key in varying})
        given = OmegaConf.to_container(config.hydra.overrides.hydra)
        self._named = any(str(o).startswith("hydra.sweep.subdir=") for o in given or ())
        self._code = code_state()
        self._launched = False

    def add(self, overrides: Sequence[str]) -> Job:
        """Plan a run: compose its config, name its directory, see what is there already.

        A config that is wrong, or that is not that of the run in its directory, makes a failed
        job, not an error.

        Raises:
            Hydra's errors of composition: the command line is wrong.
        """
        cfg = self._loader.load_sweep_config(self._config, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.num = len(self.jobs)
            cfg.hydra.job.id = str(len(self.jobs))
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(cfg)  # for the resolver of ${hydra:…}
        try:
            base = str(OmegaConf.select(cfg, "hydra.sweep.subdir"))
        finally:
            HydraConfig.instance().cfg = before
        named_by = [key for key in self._varying if key not in IN_BASE]
        name = base if self._named else run_name(base, cfg, overrides, named_by)
        job = Job(list(overrides), self.directory / name, None)
        if not job.directory.is_relative_to(self.directory):
            raise ConfigError(
                f"hydra.sweep.subdir={base}: must be a path within hydra.sweep.dir, "
                f"{self.directory}"
            )
        try:
            task = copy.deepcopy(cfg)
            with open_dict(task):
                del task["hydra"]
            config = to_config(task)
            if isinstance(config, TrainConfig):
                job.config = asdict(config)
                job.outcome = _recalled(job)
        except (ConfigError, RunError, OSError) as error:
            job.outcome = Outcome("failed", error=describe(error))
        other = self.jobs.setdefault(job.directory, job)
        if other is not job and (other.config is None or other.config != job.config):
            raise ConfigError(
                f"two runs of this sweep would share {job.directory}: hydra.sweep.subdir must "
                "tell them apart"
            )
        return other

    def check(self, overrides: Sequence[str]) -> None:
        """Compose the config of a run that is not planned yet.

        Raises:
            Hydra's errors of composition: there is no such run.
        """
        self._loader.load_sweep_config(self._config, list(overrides))

    def refuse_if_nothing_can_start(self) -> None:
        """End with one message if every command is wrong.

        Raises:
            ConfigError: that of the first run.
        """
        outcomes = [job.outcome for job in self.jobs.values()]
        wrong = all(outcome and outcome.status == "failed" for outcome in outcomes)
        if wrong and not self._launched:
            first = next(iter(outcomes))
            raise ConfigError(str(first and first.error))

    def launch(self, jobs: Sequence[Job]) -> None:
        """Run those of the jobs that have no outcome yet; afterwards all have one.

        Raises:
            KeyboardInterrupt: says how to go on.
            RunError: the launcher refuses the jobs.
        """
        waiting = list({job.directory: job for job in jobs if job.outcome is None}.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        for job in waiting:
            if job.config is not None and not _has_started(job):
                # The run refuses another config than this, and that is the check that its
                # machine composes what was launched here.
                try:
                    write_text(job.directory / "config.yaml", OmegaConf.to_yaml(job.config))
                except OSError as error:
                    reason = f"cannot write to {job.directory}: {error.strerror}"
                    job.outcome = Outcome("failed", error=reason)
        waiting = [job for job in waiting if job.outcome is None]
        self._record()
        if not waiting:
            return
        batch = [
            [*job.overrides, f"hydra.sweep.subdir={quoted(without_interpolations(name))}"]
            for job in waiting
            for name in [str(job.directory.relative_to(self.directory))]
        ]
        self._launched = True
        try:
            with terminable():
                import_files()  # else their settings would travel as classes of their own
                returns = self._launcher.launch(batch, initial_job_idx=jobs.index(waiting[0]))
            for job, returned in zip(waiting, returns, strict=True):
                job.outcome = _outcome(returned)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"{interrupt or 'interrupted'}\n{self._to_go_on()}") from None
        except (ConfigError, RunError):
            raise
        except Exception as error:  # a launcher's: joblib ends all workers when one has died
            for job in waiting:
                job.outcome = _left_behind(job, f"the launcher gave up: {describe(error)}")
        finally:
            self._record()

    def finish(self) -> None:
        """Print how the runs ended.

        Raises:
            RunError: some failed; lists them.
        """
        if failures := self.summarise():
            raise RunError(f"{failures}\n{self._to_go_on()}")

    def summarise(self) -> str:
        """Print how many runs ended how; return a list of those that failed, or nothing."""
        ended = [(job, job.outcome) for job in self.jobs.values() if job.outcome]
        counts = {s: sum(o.status == s for _, o in ended) for s in ("completed", "recalled")}
        bad = [(job, outcome) for job, outcome in ended if outcome.status == "failed"]
        other = [job.directory.name for job, outcome in ended if outcome.other_code]
        if other:
            print(f"{len(other)} runs used other code than was launched: {', '.join(other)}")
        runs = "run" if len(ended) == 1 else "runs"
        print(
            f"\n{len(ended)} {runs}: {counts['completed']} completed, "
            f"{counts['recalled']} recalled, {len(bad)} failed; sweep directory {self.directory}"
        )
        lines = [f"  {job.directory}{self._values(job)}: {o.error}" for job, o in bad]
        return "\n".join([f"{len(bad)} of {len(ended)} runs failed:", *lines]) if bad else ""

    def _values(self, job: Job) -> str:
        """What tells this run from the others, as it was typed, in brackets."""
        keys = self._varying
        own = [o for o in job.overrides if _plain_key(o.partition("=")[0]) in keys]
        return f" ({' '.join(own)})" if own else ""

    def _to_go_on(self) -> str:
        return to_go_on("hydra.sweep.dir", self.directory)

    def _record(self) -> None:
        own = {
            str(job.directory.relative_to(self.directory)): {
                "overrides": job.overrides,
                **(asdict(job.outcome) if job.outcome else {"status": "launched"}),
            }
            for job in self.jobs.values()
        }
        content = {"argv": sys.argv, "code": self._code, "runs": {**self._earlier(), **own}}
        write_json(self.directory / SWEEP_FILE, content)

    def _earlier(self) -> dict[str, Any]:
        """What earlier calls have recorded: of the runs that are there, and of the failed ones."""
        from metarun.rundir.directory import read_json  # here, because it imports torch

        runs = read_json(self.directory / SWEEP_FILE).get("runs")
        return {
            name: entry
            for name, entry in (runs.items() if isinstance(runs, dict) else ())
            if isinstance(entry, dict)
            and (entry.get("status") == "failed" or (self.directory / name).is_dir())
        }


def run_name(base: str, cfg: DictConfig, overrides: Sequence[str], varying: Sequence[str]) -> str:
    """The name of a run's directory: the base, and every varying setting with its value.

    It depends on the settings and not on the order of the runs, so that it stays the same when
    the sweep gets more values. Characters that shells, Hydra or file systems do not like are
    replaced, and a digest keeps apart what has become alike or too long.
    """
    texts = {_plain_key(key): text for key, _, text in (o.partition("=") for o in overrides)}
    parts = []
    for key in varying:
        text = texts.get(key, "")
        value = OmegaConf.select(cfg, key, default=None)  # 1e-1 and 0.10 are the same 0.1
        if OmegaConf.is_config(value):
            plain = OmegaConf.to_container(value, resolve=True)
            text = text or json.dumps(plain)
        elif value is not None:
            text = str(value)
        parts.append(f"{key}-{text}")
    exact = "_".join([base, *parts])
    name = re.sub(r"[^\w.+-]+", "-", exact, flags=re.ASCII).strip("-")
    if name != exact or len(name) > NAME_LENGTH:
        digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
        name = f"{name[: NAME_LENGTH - 9]}-{digest}"
    return name


def _plain_key(key: str) -> str:
    """The key of an override without its sign and package."""
    return key.lstrip("+~").partition("@")[0]


def _recalled(job: Job) -> Outcome | None:
    """The outcome of a run that was finished before; None if there is something to do.

    Raises:
        ConfigError: its directory holds a run of another config.
    """
    from metarun.rundir import directory as rundir
    from metarun.training import result as results

    assert job.config is not None
    if not _has_started(job):
        return None  # never started, whatever an earlier launch has put there
    result = rundir.finished_result(job.directory, job.config)
    if result is not None and rundir.reads_elsewhere(job.directory, job.config):
        return None  # the run itself looks whether the data are the same
    if result is None or not results.is_whole(result):  # the run will test again
        return None
    return Outcome("recalled", float(result["best"]["score"]))


def _has_started(job: Job) -> bool:
    """Whether there is a run already, which has its config; it may become longer."""
    return any((job.directory / name).exists() for name in TRACES)


def _left_behind(job: Job, reason: str) -> Outcome:
    """The outcome of a run whose launcher has not told it."""
    try:
        done = None if job.config is None else _recalled(job)
    except (ConfigError, RunError):
        done = None
    return Outcome("completed", done.score) if done else Outcome("failed", error=reason)


def _outcome(returned: Any) -> Outcome:
    """What a launcher gave back for a job: an outcome, or the error of its process."""
    try:
        value = returned._return_value
    except AttributeError as error:
        value = error
    if isinstance(value, Outcome):
        return value
    return Outcome("failed", error=describe(value))
