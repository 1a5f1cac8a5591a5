"""submitit's launchers, with patience for jobs that die. (Hydra imports no module with _.)"""

import logging
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

from metarun.errors import ConfigError, RunError
from metarun.sweeps.job import requeued_not_failed

log = logging.getLogger(__name__)


class _Launcher(submitit_launcher.BaseSubmititLauncher):  # type: ignore[misc]
    """hydra-submitit-launcher's, but for `launch`, which gave up the sweep at the first job
    that died without a result (out of memory, node lost, cancelled)."""

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run one job, in its own process."""
        with requeued_not_failed():
            returned = super().__call__(*arguments)
        assert isinstance(returned, JobReturn)
        return returned

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Submit the jobs as one array and wait for them; a dead one returns its error."""
        assert self.config is not None
        jobs = self._submit(job_overrides, initial_job_idx)
        folder = Path(jobs[0].paths.folder).parent
        log.info(
            "%d jobs submitted, the first as %s; logs below %s", len(jobs), jobs[0].job_id, folder
        )
        try:
            return [self._result(job) for job in jobs]
        except KeyboardInterrupt:
            self._leave(jobs)
            raise

    def _submit(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
        import submitit

        logging.getLogger("submitit").propagate = False  # it prints by itself
        ours = ("submitit_folder", "max_num_timeout")
        common = set(BaseQueueConf.__dataclass_fields__)
        given = {
            key if key in common else f"{self._EXECUTOR}_{key}": value
            for key, value in self.params.items()
            if key not in ours
        }
        arguments = [
            (list(overrides), "hydra.sweep.dir", first + i, str(first + i), Singleton.get_state())
            for i, overrides in enumerate(job_overrides)
        ]
        try:
            executor = submitit.AutoExecutor(
                folder=self.params["submitit_folder"],
                cluster=self._EXECUTOR,
                **{
                    f"{self._EXECUTOR}_{key}": self.params[key]
                    for key in ("max_num_timeout",)
                    if key in self.params
                },
            )
            executor.update_parameters(**given)
            return list(executor.map_array(self, *zip(*arguments, strict=True)))
        except RuntimeError as error:  # there is no cluster, or it says no
            reason = next(reversed(str(error).strip().splitlines()), "no reason given")
            raise RunError(f"the jobs cannot be submitted: {reason}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"hydra.launcher: {error}") from error

    def _result(self, job: Any) -> JobReturn:
        """Wait for a job: what it returned, or a failure if it died without a result."""
        import submitit

        delay = 1.0
        while not job.done() and not self._gone(job):
            time.sleep(delay)
            delay = min(30.0, 1.2 * delay)
        try:
            if not job.done():
                raise submitit.core.utils.UncompletedJobError("gone from the queue")
            returned = job.results()[0]
            assert isinstance(returned, JobReturn)
            return returned
        except submitit.core.utils.UncompletedJobError as error:
            failure = RunError(f"job {job.job_id} died; its log is {Path(job.paths.stderr)}")
            failure.__cause__ = error
            return JobReturn(status=JobStatus.FAILED, _return_value=failure)

    def _gone(self, job: Any) -> bool:
        """Whether the job has ended in a way that submitit does not learn of."""
        return False

    def _leave(self, jobs: Sequence[Any]) -> None:
        """What becomes of the jobs when the client is interrupted."""
        raise NotImplementedError


class LocalLauncher(_Launcher):
    """Processes of this machine."""

    _EXECUTOR = "local"

    def _leave(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            job.cancel()


class SlurmLauncher(_Launcher):
    """Jobs of a SLURM cluster. They go on when the client ends."""

    _EXECUTOR = "slurm"

    def _gone(self, job: Any) -> bool:
        # submitit asks sacct, which knows nothing on clusters without accounting.
        command = ["squeue", "--noheader", "--jobs", job.job_id]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        unknown = asked.returncode == 0 or "Invalid job id" in asked.stderr
        if asked.stdout.strip() or not unknown:
            return False
        time.sleep(5)  # a shared file system may show the result later
        return not job.done()

    def _leave(self, jobs: Sequence[Any]) -> None:
        array = jobs[0].job_id.partition("_")[0]
        raise KeyboardInterrupt(f"interrupted; the jobs go on (to end them: scancel {array})")
