"""`metarun train`."""

from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.sweeps.job import job
from metarun.training.run import run


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="train")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once for each job of a sweep."""
    return job(run)(cfg)
