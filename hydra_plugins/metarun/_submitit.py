"""submitit's launchers, with patience for jobs that die. (Hydra imports no module with _.)"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

from metarun.errors import ConfigError, RunError
from metarun.job import requeued_not_failed

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
            return [_result(job) for job in jobs]
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
        except submitit.core.utils.FailedSubmissionError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(f"the jobs cannot be submitted: {reason}") from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"hydra.launcher: {error}") from error

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

    def _leave(self, jobs: Sequence[Any]) -> None:
        array = jobs[0].job_id.partition("_")[0]
        raise KeyboardInterrupt(f"interrupted; the jobs go on (to end them: scancel {array})")


def _result(job: Any) -> JobReturn:
    import submitit

    try:
        returned = job.results()[0]
        assert isinstance(returned, JobReturn)
        return returned
    except submitit.core.utils.UncompletedJobError as error:
        path = Path(job.paths.stderr)
        reason = f"job {job.job_id} died ({job.state}); its log is {path}"
        failure = RunError(reason)
        failure.__cause__ = error
        return JobReturn(status=JobStatus.FAILED, _return_value=failure)
