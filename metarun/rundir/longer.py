"""A run that is trained longer than it was begun with: the same directory, more meta-steps.

Nothing in a meta-step depends on how many are still to come, with two exceptions. A schedule other
than a constant one does: it is refused. And `plan.py` looks at the length of a run when it decides
how to compute it, which may change bits: so a run keeps for life the plan of its first length,
`planned_for` in its checkpoints.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarun.errors import ConfigError

log = logging.getLogger(__name__)

STEPS = "trainer.steps"


def check_length(there: Mapping[str, Any], here: Mapping[str, Any], place: Path) -> None:
    """Refuse a number of meta-steps with which a run cannot go on; all else is the same.

    Args:
        there: the run's own settings, by dotted key.
        here: those it is to go on with.
        place: where the run is, for the message.

    Raises:
        ConfigError: it is smaller, or the learning rate depends on it.
    """
    before, now = there.get(STEPS), here.get(STEPS)
    if before == now:
        return
    if type(before) is not int or type(now) is not int:
        raise ConfigError(f"{place} holds a run of another config ({STEPS}: {before} there)")
    if now < before:
        raise ConfigError(
            f"{STEPS}={now}: {place} holds a run of {before} meta-steps, which may become longer "
            f"but not shorter: nothing was changed; give {STEPS}={before} or more, or choose "
            "another hydra.run.dir"
        )
    schedule = here.get("outer_opt.schedule", "constant")
    if schedule != "constant":
        raise ConfigError(
            f"{STEPS}={now}: {place} holds a run of {before} meta-steps with "
            f"outer_opt.schedule={schedule}, whose learning rates depend on that number from the "
            "first meta-step on, so it cannot become longer: nothing was changed; choose another "
            "hydra.run.dir for a new run"
        )


def keep_earlier_result(directory: Path, result: Mapping[str, Any], steps: int | None) -> None:
    """Put the result of a shorter run beside the place where the longer one's will be.

    Called before `config.yaml` has the new length: whatever a kill leaves, no result stands beside
    a config that it is not of.

    Args:
        result: what `result.json` holds.
        steps: meta-steps that the run has from now on.
    """
    before = result.get("steps")
    if type(before) is not int or steps is None or not 0 < before < steps:
        return
    kept = directory / f"result-{before}.json"
    (directory / "result.json").replace(kept)
    log.info(
        "%s holds this run with %d meta-steps: it goes on to %d; its result so far is kept as %s",
        directory,
        before,
        steps,
        kept.name,
    )
