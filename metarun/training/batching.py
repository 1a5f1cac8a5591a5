"""Whether vmap can map a plugin's functions over tasks: found out at the first call."""

import logging
from collections.abc import Callable
from typing import Any

from metarun.errors import ConfigError, MetarunError, is_out_of_memory
from metarun.unroll import RecordingError
from metarun.unroll.advice import plain_reason
from metarun.unroll.gradients.recompute import RandomState, tensor_leaves

log = logging.getLogger(__name__)


class TriedByVmap:
    """A function of `(meta, tasks, …)` by vmap; in a loop over tasks if vmap cannot map it.

    The first call decides. It depends on the code of the components alone, so a resumed run
    comes to the same, and a run in a loop has the bits that engine.batching=loop gives.

    Args:
        by_vmap: the function as vmap computes it.
        in_a_loop: makes the function that computes a task after the other.
        what: what it computes, in the plural.
        insisted: whether the user asked for vmap, so that a loop is no way out.
    """

    def __init__(
        self,
        by_vmap: Callable[..., Any],
        in_a_loop: Callable[[], Callable[..., Any]],
        what: str,
        insisted: bool,
    ) -> None:
        self.run, self.in_a_loop, self.what, self.insisted = by_vmap, in_a_loop, what, insisted
        self.settled = False

    def __call__(self, meta: Any, tasks: Any, *step: int) -> Any:
        if self.settled:
            return self.run(meta, tasks, *step)
        before = RandomState(tensor_leaves((meta, tasks)))
        try:
            outcome = self.run(meta, tasks, *step)
        except Exception as error:
            if not _may_be_of_vmap(error):
                raise
            before.restore()
            outcome = self._looped(error, meta, tasks, *step)
        self.settled = True
        return outcome

    def _looped(self, error: Exception, *given: Any) -> Any:
        run = self.in_a_loop()
        outcome = run(*given)  # if this fails too, vmap is not the cause
        reason = plain_reason(error.__cause__ if isinstance(error, ConfigError) else error)
        if self.insisted:
            raise ConfigError(
                f"engine.batching=vmap: {self.what} with this algorithm and this network cannot be "
                f"mapped over tasks by vmap: {reason}; use engine.batching=auto or loop"
            ) from error
        log.info(
            "%s are computed in a loop over tasks, which vmap cannot map: %s", self.what, reason
        )
        self.run = run
        return outcome


def _may_be_of_vmap(error: Exception) -> bool:
    """Whether a loop is worth a try: not after a refusal of ours, nor for want of memory."""
    if is_out_of_memory(error):
        return False
    return not isinstance(error, MetarunError) or isinstance(error.__cause__, RecordingError)
