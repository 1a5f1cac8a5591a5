"""`metarun eval`."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config.trained import EvalConfig
from metarun.sweeps.job import job


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="eval")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once for each job of a sweep."""
    return job(run)(cfg)


def run(config: EvalConfig, directory: str | Path) -> float:
    """Evaluate a checkpoint, print the figures and write them to `result.json`.

    Returns:
        The score.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from metarun.inference.evaluate import evaluate_checkpoint
    from metarun.system.interrupts import Interruption
    from metarun.system.lifetime import collect_from_here
    from metarun.system.ranks import join

    collect_from_here()
    ranks = join()
    directory = Path(ranks.broadcast_from_first(directory))
    with Interruption(ranks.largest if ranks.count > 1 else None) as stop:
        score, told = evaluate_checkpoint(config, directory, ranks, stop)
    for line in told:
        print(line)
    return score
