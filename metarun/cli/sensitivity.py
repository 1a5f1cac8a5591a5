"""`metarun sensitivity`."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from metarun.config.trained import SensitivityConfig
from metarun.errors import ConfigError
from metarun.sweeps.job import job


@hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="sensitivity")
def main(cfg: DictConfig) -> Any:
    """Compose the config and run it; Hydra calls this once."""
    return job(run)(cfg)


def run(config: SensitivityConfig, directory: str | Path) -> float:
    """Score a checkpoint under several protocols; print the table and write it.

    Returns:
        The score under the run's own protocol.
    """
    # Imported here, so that --help and --cfg answer without waiting for torch.
    from tqdm import tqdm

    from metarun.inference.sensitivity import Evaluated, described, measure, to_do
    from metarun.inference.sensitivity_table import MARK, as_markdown, as_text, told
    from metarun.system.files import write_json, write_text
    from metarun.system.interrupts import Interruption
    from metarun.system.lifetime import collect_from_here

    collect_from_here()
    out = Path(config.out)
    if out.exists() and not (out.is_file() and MARK in out.read_text(errors="replace")):
        raise ConfigError(f"out={out} was not written by metarun sensitivity: choose another name")
    run = Evaluated(config)
    print(f"{run.path}, after meta-step {run.content['step']}: {told(run)}")
    total = to_do(run)
    with Interruption() as stop, tqdm(total=total, unit="task", disable=None) as bar:

        def advance(done: int) -> None:
            bar.update(done - bar.n)
            stop.check()

        with stop.deferred():
            rows = list(measure(run, advance))
    for line in as_text(run, rows):
        print(line)
    write_text(out, "\n".join(as_markdown(run, rows)) + "\n")
    write_json(beside := out.with_suffix(".json"), described(run, rows))
    print(f"written to {out} and {beside}")
    return rows[0].score
